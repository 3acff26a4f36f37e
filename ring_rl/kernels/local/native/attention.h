// Blockwise attention of one rectangle, forward and backward, as independent pieces of work for threads.
// The algorithm is FlashAttention-2's, arXiv:2307.08691.
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <utility>

#include "rectangle.h"

namespace ring_rl {

// Of a logit that is hidden, and the least maximum of a row: exp(hidden - maximum) = 0 even where a row has seen
// nothing yet, and nothing is ever inf - inf.
constexpr float kHidden = std::numeric_limits<float>::lowest(), kLeastMaximum = kHidden / 2;

// Memory of one thread, kept for its next piece of work.
inline float* scratch(size_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local size_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)));
    if (!memory) throw std::bad_alloc();
    size = floats;
  }
  return memory.get();
}

// Logits of a tile from its products, in place: soft cap, ALiBi, and kHidden where `sees` says that not all is visible.
// With `slope_of_cap`, d logit / d product goes there.
inline void finish_scores(const Rectangle& r, const Stretch& q, const Stretch& k, Sight sees, float slope,
                          float* scores, float* slope_of_cap) {
  if (sees == Sight::all && !r.changes_scores()) return;
  for (int t = 0; t < q.count; ++t) {
    for (int s = 0; s < k.lanes(); s += kLanes) {
      float* at = scores + t * kTile + s;
      Floats x = load(at);
      if (r.soft_cap > 0) {
        const Floats bounded = tanh(x / r.soft_cap);
        x = r.soft_cap * bounded;
        if (slope_of_cap) store(slope_of_cap + t * kTile + s, 1.0f - bounded * bounded);
      }
      if (r.slopes) x -= slope * magnitude(__builtin_convertvector(load(k.position + s) - q.position[t], Floats));
      if (sees == Sight::some) x = shown(r, q, k, t, s) ? x : all(kHidden);
      store(at, x);
    }
  }
}

struct Forward {
  Rectangle r;
  float *out, *log_sum_exp;
  Side query_side, key_side;

  void prepare() { query_side = r.query_side(), key_side = r.key_side(); }
  int64_t query_packs() const { return (r.T + kPacked * kTile - 1) / (kPacked * kTile); }
  int64_t pieces() const { return r.rows * r.query_heads * query_packs(); }

  // The last queries of a causal rectangle have the most to do, and so come first.
  void piece(int64_t index) const {
    const int64_t packs = query_packs(), of_head = r.rows * r.query_heads;
    const int64_t pack = packs - 1 - index / of_head, row = index % of_head / r.query_heads;
    const int64_t head = index % r.query_heads, key_head = head / r.group();
    const int64_t start = pack * kPacked * kTile, row_head = row * r.query_heads + head;
    const int tiles = static_cast<int>(std::min<int64_t>(kPacked, (r.T - start + kTile - 1) / kTile));
    const int width = r.width(), D = static_cast<int>(r.D);

    float* memory = scratch(static_cast<size_t>(kTile) *
                            (2 * kPacked * width + 2 * width + kTile + kPacked * (3 + kLanes)));
    auto take = [&memory](size_t floats) { return std::exchange(memory, memory + floats); };
    float *q = take(kPacked * kTile * width), *sums = take(kPacked * kTile * width);
    float *k = take(kTile * width), *v = take(kTile * width), *scores = take(kTile * kTile);
    // A row's denominator is kept lane by lane and summed at the end.
    float *denominators = take(kPacked * kTile * kLanes), *maxima = take(kPacked * kTile);
    float *all_denominators = take(kPacked * kTile), *all_maxima = take(kPacked * kTile);

    Stretch queries[kPacked], keys;
    const float slope = r.slopes ? r.slopes[row / r.rows_a_slope * r.query_heads + head] : 0;
    for (int i = 0; i < tiles; ++i) queries[i].fill(query_side, row, pack * kPacked + i, r.causal_block);
    const auto seen = [&](const Span& keys) {
      return std::any_of(queries, queries + tiles, [&](const Stretch& q) { return sees_any(r, q, keys); });
    };
    if (!key_side.any_tile(row, seen)) {
      const int64_t first = row_head * r.T + start, count = std::min<int64_t>(kPacked * kTile, r.T - start);
      std::fill(out + first * r.D, out + (first + count) * r.D, 0.0f);
      std::fill(log_sum_exp + first, log_sum_exp + first + count, -std::numeric_limits<float>::infinity());
      return;
    }
    for (int i = 0; i < tiles; ++i) {
      const int64_t from = row_head * r.T + start + i * kTile;
      pack_rows(r.q, r.half_width, from, queries[i].count, r.D, width, r.scale, q + i * kTile * width);
    }
    std::fill(sums, sums + tiles * kTile * width, 0.0f);
    std::fill(denominators, denominators + tiles * kTile * kLanes, 0.0f);
    std::fill(maxima, maxima + tiles * kTile, kLeastMaximum);

    // The sums so far join those of all keys before, which are kept in `out`; at the end that is divided.
    bool alone = true, empty = true;
    const auto settle = [&](bool at_the_end) {
      for (int i = 0; i < tiles; ++i) {
        for (int t = 0; t < queries[i].count; ++t) {
          const int at = i * kTile + t;
          const float earlier = alone ? 0 : std::exp(all_maxima[at] - maxima[at]);
          float denominator = sum_of(load(denominators + at * kLanes));
          if (!alone) denominator += earlier * all_denominators[at];
          // NaN is not 0: what is broken stays visible.
          const bool blind = at_the_end && denominator == 0;
          const float factor = at_the_end ? r.kept_scale / denominator : 1;
          float* to = out + (row_head * r.T + start + at) * r.D;
          for (int d = 0; d < D; ++d) {
            const float sum = alone ? sums[at * width + d] : earlier * to[d] + sums[at * width + d];
            to[d] = blind ? 0 : factor * sum;
          }
          all_denominators[at] = denominator, all_maxima[at] = maxima[at];
          if (at_the_end)
            log_sum_exp[row_head * r.T + start + at] =
                blind ? -std::numeric_limits<float>::infinity() : maxima[at] + std::log(denominator);
        }
      }
      alone = false;
    };

    uint32_t key_bits[kTile];
    for (int64_t tile = 0; tile < key_side.tiles(); ++tile) {
      if (tile % kGrouped == 0) {
        if (!empty) {
          settle(false);
          std::fill(sums, sums + tiles * kTile * width, 0.0f);
          std::fill(denominators, denominators + tiles * kTile * kLanes, 0.0f);
          empty = true;
        }
        if (!seen(key_side.group(row, tile))) {
          tile += kGrouped - 1;
          continue;
        }
      }
      const Span& span = key_side.span(row, tile);
      bool packed = false;
      for (int i = 0; i < tiles; ++i) {
        const Sight sees = sight(r, queries[i], span);
        if (sees == Sight::none) continue;
        const bool few = r.T <= kFew;
        if (!packed) {
          keys.fill(key_side, row, tile, r.causal_block);
          const int64_t from = (row * r.key_heads + key_head) * r.S + tile * kTile;
          if (few)
            pack_rows(r.k, r.half_width, from, keys.count, r.D, width, 1.0f, k);
          else
            pack_columns(r.k, r.half_width, from, keys.count, r.D, k);
          pack_rows(r.v, r.half_width, from, keys.count, r.D, width, 1.0f, v);
          if (r.drop_below) fill_key_bits(keys, key_bits);
          packed = true;
        }
        empty = false;
        const int count = queries[i].count;
        if (few)
          for (int t = 0; t < count; ++t)
            for (int s = 0; s < keys.lanes(); ++s) scores[t * kTile + s] = dot(width, q + t * width, k + s * width);
        else
          product(count, keys.lanes(), D, q + i * kTile * width, width, 1, k, kTile, scores, kTile, false);
        finish_scores(r, queries[i], keys, sees, slope, scores, nullptr);
        const uint32_t* row_bits = r.drop_below ? r.row_bits + row_head * r.T + start + i * kTile : nullptr;
        weigh(count, keys.lanes(), scores, maxima + i * kTile, denominators + i * kTile * kLanes,
              sums + i * kTile * width, width, row_bits, key_bits);
        product(count, width, keys.count, scores, kTile, 1, v, width, sums + i * kTile * width, width, true);
      }
    }
    settle(true);
  }

 private:
  // Scores become weights against the rows' new maxima, and what was summed so far is made smaller accordingly.
  void weigh(int count, int lanes, float* scores, float* maxima, float* denominators, float* sums, int width,
             const uint32_t* row_bits, const uint32_t* key_bits) const {
    for (int t = 0; t < count; ++t) {
      float* row = scores + t * kTile;
      Floats most = load(row);
      for (int s = kLanes; s < lanes; s += kLanes) most = larger(most, load(row + s));
      const float maximum = std::max(maxima[t], largest_of(most));
      if (maximum > maxima[t]) {
        const float smaller = std::exp(maxima[t] - maximum);
        store(denominators + t * kLanes, smaller * load(denominators + t * kLanes));
        for (int d = 0; d < width; d += kLanes) store(sums + t * width + d, smaller * load(sums + t * width + d));
        maxima[t] = maximum;
      }
      Floats denominator = load(denominators + t * kLanes);
      for (int s = 0; s < lanes; s += kLanes) {
        Floats weight = exp(load(row + s) - maximum);
        denominator += weight;
        if (r.drop_below) weight = kept(r, row_bits[t], key_bits + s) ? weight : Floats{};
        store(row + s, weight);
      }
      store(denominators + t * kLanes, denominator);
    }
  }
};

// Gradients. A piece is a share of one row's and key-value head's keys: it owns their dk and dv, and sums what they
// bring to dq into `dq` of its share, so that no two pieces write to the same place and sums have a fixed order.
struct Backward {
  Rectangle r;
  const void* d_out;
  bool half_width_d_out;
  const float *log_sum_exp, *delta;
  int64_t shares;
  float *dq, *dk, *dv;  // dq: [rows, shares, H, T, D]
  Side query_side, key_side;

  void prepare() { query_side = r.query_side(), key_side = r.key_side(); }
  int64_t pieces() const { return r.rows * r.key_heads * shares; }

  void piece(int64_t index) const {
    const int64_t share = index % shares, key_head = index / shares % r.key_heads;
    const int64_t row = index / (shares * r.key_heads);
    const int width = r.width(), D = static_cast<int>(r.D), pack = kPacked * kTile;
    const int64_t packs = (r.S + pack - 1) / pack, first_head = key_head * r.group();

    float* memory = scratch(static_cast<size_t>(kTile) * (3 * kPacked * width + 2 * kPacked * D + 3 * width +
                                                          (r.soft_cap > 0 ? 3 : 2) * kTile));
    auto take = [&memory](size_t floats) { return std::exchange(memory, memory + floats); };
    float *kT = take(pack * D), *vT = take(pack * D), *k = take(pack * width);
    float *dk_sum = take(pack * width), *dv_sum = take(pack * width);
    float *q = take(kTile * width), *d_o = take(kTile * width), *dq_sum = take(kTile * width);
    float *weights = take(kTile * kTile), *d_scores = take(kTile * kTile);
    float* slope_of_cap = r.soft_cap > 0 ? take(kTile * kTile) : nullptr;

    float* dq_share = dq + ((row * shares + share) * r.query_heads + first_head) * r.T * r.D;
    std::fill(dq_share, dq_share + r.group() * r.T * r.D, 0.0f);

    Stretch queries, keys[kPacked];
    uint32_t key_bits[kPacked * kTile];
    for (int64_t p = share; p < packs; p += shares) {
      const int64_t start = p * pack, from = (row * r.key_heads + key_head) * r.S + start;
      const int tiles = static_cast<int>(std::min<int64_t>(kPacked, (r.S - start + kTile - 1) / kTile));
      for (int j = 0; j < tiles; ++j) keys[j].fill(key_side, row, p * kPacked + j, r.causal_block);
      const auto seen = [&](const Span& queries) {
        return std::any_of(keys, keys + tiles, [&](const Stretch& k) { return sees_any(r, queries, k); });
      };
      if (!query_side.any_tile(row, seen)) {
        const int64_t stop = from + std::min<int64_t>(pack, r.S - start);
        std::fill(dk + from * r.D, dk + stop * r.D, 0.0f);
        std::fill(dv + from * r.D, dv + stop * r.D, 0.0f);
        continue;
      }
      for (int j = 0; j < tiles; ++j) {
        const int64_t first = j * kTile, count = keys[j].count;
        pack_columns(r.k, r.half_width, from + first, count, r.D, kT + j * kTile * D);
        pack_columns(r.v, r.half_width, from + first, count, r.D, vT + j * kTile * D);
        pack_rows(r.k, r.half_width, from + first, count, r.D, width, 1.0f, k + j * kTile * width);
        if (r.drop_below) fill_key_bits(keys[j], key_bits + j * kTile);
      }
      std::fill(dk_sum, dk_sum + tiles * kTile * width, 0.0f);
      std::fill(dv_sum, dv_sum + tiles * kTile * width, 0.0f);
      // The sums so far join those of all queries before, which are kept in dk and dv.
      bool alone = true;
      int64_t summed = 0;
      const auto settle = [&] {
        for (int64_t s = 0; s < std::min<int64_t>(pack, r.S - start); ++s) {
          float *to_k = dk + (from + s) * r.D, *to_v = dv + (from + s) * r.D;
          for (int d = 0; d < D; ++d) to_k[d] = (alone ? 0 : to_k[d]) + dk_sum[s * width + d];
          for (int d = 0; d < D; ++d) to_v[d] = (alone ? 0 : to_v[d]) + dv_sum[s * width + d];
        }
        alone = false;
      };
      for (int64_t tile = 0; tile < query_side.tiles(); ++tile) {
        if (tile % kGrouped == 0 && !seen(query_side.group(row, tile))) {
          tile += kGrouped - 1;
          continue;
        }
        const Span& span = query_side.span(row, tile);
        Sight sees[kPacked];
        bool any = false;
        for (int j = 0; j < tiles; ++j) any |= (sees[j] = sight(r, span, keys[j])) != Sight::none;
        if (!any) continue;
        queries.fill(query_side, row, tile, r.causal_block);
        const int64_t first = tile * kTile, count = queries.count;
        if (summed >= kGrouped) {
          settle();
          std::fill(dk_sum, dk_sum + tiles * kTile * width, 0.0f);
          std::fill(dv_sum, dv_sum + tiles * kTile * width, 0.0f);
          summed = 0;
        }
        summed += r.group();
        for (int64_t g = 0; g < r.group(); ++g) {
          const int64_t head = first_head + g, at = (row * r.query_heads + head) * r.T + first;
          pack_rows(r.q, r.half_width, at, count, r.D, width, r.scale, q);
          pack_rows(d_out, half_width_d_out, at, count, r.D, width, 1.0f, d_o);
          const float slope = r.slopes ? r.slopes[row / r.rows_a_slope * r.query_heads + head] : 0;
          bool add = false;
          for (int j = 0; j < tiles; ++j) {
            if (sees[j] == Sight::none) continue;
            const int T = queries.count, S = keys[j].count, lanes = keys[j].lanes();
            product(T, lanes, D, q, width, 1, kT + j * kTile * D, kTile, weights, kTile, false);
            finish_scores(r, queries, keys[j], sees[j], slope, weights, slope_of_cap);
            product(T, lanes, D, d_o, width, 1, vT + j * kTile * D, kTile, d_scores, kTile, false);
            const uint32_t* row_bits = r.drop_below ? r.row_bits + at : nullptr;
            differentiate(T, lanes, sees[j], weights, d_scores, log_sum_exp + at, delta + at, slope_of_cap, row_bits,
                          key_bits + j * kTile);
            product(S, width, T, weights, 1, kTile, d_o, width, dv_sum + j * kTile * width, width, true);
            product(S, width, T, d_scores, 1, kTile, q, width, dk_sum + j * kTile * width, width, true);
            product(T, width, S, d_scores, kTile, 1, k + j * kTile * width, width, dq_sum, width, add);
            add = true;
          }
          float* to = dq_share + (g * r.T + first) * r.D;
          for (int64_t t = 0; t < count; ++t)
            for (int d = 0; d < D; ++d) to[t * r.D + d] += r.scale * dq_sum[t * width + d];
        }
      }
      settle();
    }
  }

 private:
  // Logits become the weights that reached the values, and gradients of the weights those of the products q·k.
  void differentiate(int count, int lanes, Sight sees, float* weights, float* d_scores, const float* lse,
                     const float* own, const float* slope_of_cap, const uint32_t* row_bits,
                     const uint32_t* key_bits) const {
    for (int t = 0; t < count; ++t) {
      for (int s = 0; s < lanes; s += kLanes) {
        const int at = t * kTile + s;
        const Floats score = load(weights + at);
        // No weight is above 1, unless the log-sum-exp is wrong: that must show as infinity.
        const Floats log_weight = score - lse[t];
        Floats weight = exp(log_weight > 89.0f ? all(89.0f) : log_weight), d_weight = load(d_scores + at);
        // A row whose log-sum-exp is NaN brings that to the keys that it sees.
        if (sees == Sight::some) weight = score == kHidden ? Floats{} : weight;
        Floats reached = weight;
        if (r.drop_below) {
          const Ints stays = kept(r, row_bits[t], key_bits + s);
          reached = stays ? r.kept_scale * weight : Floats{};
          d_weight = stays ? r.kept_scale * d_weight : Floats{};
        }
        Floats d_score = weight * (d_weight - own[t]);
        if (slope_of_cap) d_score *= load(slope_of_cap + at);
        store(weights + at, reached);
        store(d_scores + at, d_score);
      }
    }
  }
};

}  // namespace ring_rl
