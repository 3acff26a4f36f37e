// Vectors of the machine's own width, and what attention does with them: matrix products, exp and tanh.
//
// Written with the vector types of GCC and Clang, so that one text serves AVX-512, AVX2, SSE and NEON.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ring_rl {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Rows and vectors of a product that are summed in registers at a time: all 32 of AVX-512 or NEON, or all 16 of AVX2.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSummedRows = 6, kSummedVectors = 4;
#else
constexpr int kSummedRows = 4, kSummedVectors = 2;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline Ints load(const int32_t* from) { return *reinterpret_cast<const Ints*>(from); }
inline Words load(const uint32_t* from) { return *reinterpret_cast<const Words*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }
inline Floats all(float x) { return x - Floats{}; }
inline Ints all(int32_t x) { return x - Ints{}; }
inline Words all(uint32_t x) { return x - Words{}; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

inline float sum_of(Floats x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

inline float largest_of(Floats x) {
  float largest = x[0];
  for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// exp(x) for x <= 89 within 1.2 units in the last place; exactly 0 below -87, where it would be denormal; infinite from
// 88.4 on, a little early; NaN for NaN. Beyond 89 an exponent would not fit its bits: bound x where it may be so large.
// x = n ln 2 + r, |r| <= ln 2 / 2; the polynomial in r is off by 2.5e-8 at most.
inline Floats exp(Floats x) {
  const Ints vanishes = x < -87.0f;
  x = vanishes ? all(-87.0f) : x;
  const Floats magic = all(12582912.0f);  // 1.5 2^23: adding it rounds to an integer and puts that into the low bits
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  const Floats r = x - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts, the first exact times n
  Floats q = r * 1.33233075e-3f + 8.35392531e-3f;
  q = q * r + 4.16726582e-2f;
  q = q * r + 1.66666642e-1f;
  q = q * r + 0.5f;
  const Floats power = (q * r) * r + r + 1.0f;
  const Ints exponent = ((Ints)shifted - (Ints)magic + 127) << 23;
  return vanishes ? Floats{} : power * (Floats)exponent;
}

// tanh(x) within 1.6 units in the last place: odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline Floats tanh(Floats x) {
  const Floats size = magnitude(x), square = x * x;
  Floats q = square * -6.33554906e-3f + 2.12000143e-2f;
  q = q * square - 5.39042577e-2f;
  q = q * square + 1.33332014e-1f;
  q = q * square - 3.33333313e-1f;
  const Floats near = x + x * square * q;
  const Floats decay = exp(size * -2.0f);
  const Floats far = (1.0f - decay) / (1.0f + decay);
  const Floats signed_far = (Floats)((Ints)far | ((Ints)x & (int32_t)0x80000000));
  return size < 0.625f ? near : signed_far;
}

// The dot product of rows of `width` floats, a multiple of kLanes.
inline float dot(int width, const float* a, const float* b) {
  Floats sum{};
  for (int d = 0; d < width; d += kLanes) sum += load(a + d) * load(b + d);
  return sum_of(sum);
}

// C[Rows, kLanes Vectors] = A B, or C + A B with `add`; A[m, k] is a[m a_row + k a_step], so that either order of A is
// served; B and C are row by row. C comes last: errors of a sum of many products then grow with their number, not with
// that of all their terms.
template <int Rows, int Vectors>
inline void small_product(int K, const float* a, ptrdiff_t a_row, ptrdiff_t a_step, const float* b, ptrdiff_t b_row,
                          float* c, ptrdiff_t c_row, bool add) {
  Floats sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < Vectors; ++n) sum[m][n] = Floats{};
  for (int k = 0; k < K; ++k) {
    Floats row[Vectors];
#pragma GCC unroll 16
    for (int n = 0; n < Vectors; ++n) row[n] = load(b + k * b_row + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
      const Floats x = all(a[m * a_row + k * a_step]);
#pragma GCC unroll 16
      for (int n = 0; n < Vectors; ++n) sum[m][n] += x * row[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < Vectors; ++n) {
      float* to = c + m * c_row + n * kLanes;
      store(to, add ? load(to) + sum[m][n] : sum[m][n]);
    }
}

template <int Vectors>
inline void panel_product(int M, int K, const float* a, ptrdiff_t a_row, ptrdiff_t a_step, const float* b,
                          ptrdiff_t b_row, float* c, ptrdiff_t c_row, bool add) {
  int m = 0;
  for (; m + kSummedRows <= M; m += kSummedRows)
    small_product<kSummedRows, Vectors>(K, a + m * a_row, a_row, a_step, b, b_row, c + m * c_row, c_row, add);
  for (; m + 4 <= M; m += 4)
    small_product<4, Vectors>(K, a + m * a_row, a_row, a_step, b, b_row, c + m * c_row, c_row, add);
  for (; m + 1 <= M; m += 1)
    small_product<1, Vectors>(K, a + m * a_row, a_row, a_step, b, b_row, c + m * c_row, c_row, add);
}

// C[M, N] = A[M, K] B[K, N], or C + A B with `add`; N is a multiple of kLanes; strides as in `small_product`.
inline void product(int M, int N, int K, const float* a, ptrdiff_t a_row, ptrdiff_t a_step, const float* b,
                    ptrdiff_t b_row, float* c, ptrdiff_t c_row, bool add) {
  int n = 0;
  for (; n + kSummedVectors * kLanes <= N; n += kSummedVectors * kLanes)
    panel_product<kSummedVectors>(M, K, a, a_row, a_step, b + n, b_row, c + n, c_row, add);
  for (; n + 2 * kLanes <= N; n += 2 * kLanes)
    panel_product<2>(M, K, a, a_row, a_step, b + n, b_row, c + n, c_row, add);
  for (; n < N; n += kLanes) panel_product<1>(M, K, a, a_row, a_step, b + n, b_row, c + n, c_row, add);
}

}  // namespace ring_rl
