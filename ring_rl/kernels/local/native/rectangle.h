// One rectangle of queries and keys: what is asked, and which tiles and pairs of it are visible.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "vectors.h"

namespace ring_rl {

// Edge of a tile of scores: a tile, and the stretches of q, k, v that make it, lie in a core's first or second cache.
constexpr int kTile = 64;
// Tiles of one side that are packed together, and used again for every tile of the other side.
constexpr int kPacked = 4;
// Queries up to which keys are read as they lie, a dot product for each: for more they are transposed first, which
// costs as much as some dot products.
constexpr int kFew = 4;
// Tiles whose span together is known too: if nobody sees any of them they are passed over at once. And those whose
// products are summed one after the other, in cache, before that sum joins the others of its row: rounding errors grow
// with the larger of both counts, and not with the number of tokens.
constexpr int kGrouped = 64;

constexpr int32_t kLeast = std::numeric_limits<int32_t>::min(), kMost = std::numeric_limits<int32_t>::max();

inline int32_t block_of(int32_t position, int64_t size) {
  const int64_t p = position;
  return static_cast<int32_t>(p >= 0 ? p / size : -((size - 1 - p) / size));
}

// What up to kTile tokens span. Tokens that do not exist are in no span.
struct Span {
  int count;
  int32_t first, last, first_block, last_block, least_segment, most_segment;

  Span() = default;
  Span(const int32_t* positions, const int32_t* segments, int64_t tokens, int64_t causal_block)
      : count(static_cast<int>(tokens)), first(positions[0]), last(positions[0]), least_segment(0), most_segment(0) {
    for (int t = 1; t < count; ++t) first = std::min(first, positions[t]), last = std::max(last, positions[t]);
    // Blocks follow positions: the least is that of the least.
    first_block = causal_block > 1 ? block_of(first, causal_block) : first;
    last_block = causal_block > 1 ? block_of(last, causal_block) : last;
    if (!segments) return;
    least_segment = most_segment = segments[0];
    for (int t = 1; t < count; ++t) {
      least_segment = std::min(least_segment, segments[t]);
      most_segment = std::max(most_segment, segments[t]);
    }
  }

  void add(const Span& other) {
    count += other.count;
    first = std::min(first, other.first), last = std::max(last, other.last);
    first_block = std::min(first_block, other.first_block), last_block = std::max(last_block, other.last_block);
    least_segment = std::min(least_segment, other.least_segment);
    most_segment = std::max(most_segment, other.most_segment);
  }

  // `count` rounded up to whole vectors: as far as rows of scores are computed.
  int lanes() const { return (count + kLanes - 1) / kLanes * kLanes; }
};

// One side's tokens: what their tiles, and groups of tiles, span is found once a call.
class Side {
 public:
  Side() = default;
  Side(const int32_t* positions, const int32_t* segments, int64_t tokens, int64_t rows, int64_t rows_a_position,
       int64_t causal_block)
      : positions_(positions), segments_(segments), tokens_(tokens), rows_a_position_(rows_a_position) {
    // Rows that agree in positions differ by their documents alone.
    rows_a_span_ = segments ? 1 : rows_a_position;
    spans_.reserve(rows / rows_a_span_ * tiles());
    groups_.reserve(rows / rows_a_span_ * groups());
    for (int64_t row = 0; row < rows; row += rows_a_span_) {
      for (int64_t tile = 0; tile < tiles(); ++tile) {
        spans_.emplace_back(positions_of(row, tile), segments_of(row, tile),
                            std::min<int64_t>(kTile, tokens - tile * kTile), causal_block);
        if (tile % kGrouped)
          groups_.back().add(spans_.back());
        else
          groups_.push_back(spans_.back());
      }
    }
  }

  int64_t tiles() const { return (tokens_ + kTile - 1) / kTile; }
  int64_t groups() const { return (tiles() + kGrouped - 1) / kGrouped; }
  const Span& group(int64_t row, int64_t tile) const {
    return groups_[row / rows_a_span_ * groups() + tile / kGrouped];
  }
  const Span& span(int64_t row, int64_t tile) const { return spans_[row / rows_a_span_ * tiles() + tile]; }
  // Whether `is` holds for the span of any tile; what holds for a tile's holds for its group's.
  template <typename Is>
  bool any_tile(int64_t row, const Is& is) const {
    for (int64_t tile = 0; tile < tiles(); ++tile) {
      if (tile % kGrouped == 0 && !is(group(row, tile)))
        tile += kGrouped - 1;
      else if (is(span(row, tile)))
        return true;
    }
    return false;
  }
  const int32_t* positions_of(int64_t row, int64_t tile) const {
    return positions_ + row / rows_a_position_ * tokens_ + tile * kTile;
  }
  const int32_t* segments_of(int64_t row, int64_t tile) const {
    return segments_ ? segments_ + row * tokens_ + tile * kTile : nullptr;
  }

 private:
  const int32_t *positions_, *segments_;
  int64_t tokens_, rows_a_position_, rows_a_span_;
  std::vector<Span> spans_, groups_;
};

// Everything but the arrays' contents is known when the program is compiled. Rows are those of all batches together;
// one row of positions or slopes is that of as many of them as `rows_a_...` says. Pointers to what is not used are null.
struct Rectangle {
  int64_t rows, query_heads, key_heads, T, S, D;
  int64_t rows_a_query_position, rows_a_key_position, rows_a_slope;
  const void *q, *k, *v;
  bool half_width;  // q, k and v are bfloat16, not float32
  const int32_t *query_positions, *key_positions, *query_segments, *key_segments;
  const float* slopes;
  const uint32_t* row_bits;
  float scale, soft_cap, kept_scale;  // no cap: 0
  uint32_t drop_below;                // no dropout: 0
  int64_t causal_block, window;       // not causal: 0; no window: 0

  int64_t group() const { return query_heads / key_heads; }
  // D rounded up to whole vectors: the width of a packed row.
  int width() const { return static_cast<int>((D + kLanes - 1) / kLanes * kLanes); }
  bool changes_scores() const { return soft_cap > 0 || slopes; }
  Side query_side() const { return {query_positions, query_segments, T, rows, rows_a_query_position, causal_block}; }
  Side key_side() const { return {key_positions, key_segments, S, rows, rows_a_key_position, causal_block}; }
};

inline float as_float(const float* from) { return *from; }
inline float as_float(const uint16_t* from) {
  const uint32_t bits = static_cast<uint32_t>(*from) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// `count` rows of D values, times scale, as kTile rows of `width` floats; what is left over is 0.
template <typename Value>
void pack_rows(const Value* from, int64_t count, int64_t D, int width, float scale, float* to) {
  for (int64_t t = 0; t < kTile; ++t) {
    float* row = to + t * width;
    const int64_t filled = t < count ? D : 0;
    for (int64_t d = 0; d < filled; ++d) row[d] = scale * as_float(from + t * D + d);
    for (int64_t d = filled; d < width; ++d) row[d] = 0;
  }
}

// `count` rows of D values, transposed: D rows of kTile floats.
template <typename Value>
void pack_columns(const Value* from, int64_t count, int64_t D, float* to) {
  for (int64_t d = 0; d < D; ++d) {
    float* row = to + d * kTile;
    for (int64_t s = 0; s < count; ++s) row[s] = as_float(from + s * D + d);
    for (int64_t s = count; s < kTile; ++s) row[s] = 0;
  }
}

// Rows `first` to `first + count` of row-by-row array `all`, in whichever of the two dtypes it is.
inline void pack_rows(const void* all, bool half_width, int64_t first, int64_t count, int64_t D, int width, float scale,
                      float* to) {
  if (half_width)
    pack_rows(static_cast<const uint16_t*>(all) + first * D, count, D, width, scale, to);
  else
    pack_rows(static_cast<const float*>(all) + first * D, count, D, width, scale, to);
}
inline void pack_columns(const void* all, bool half_width, int64_t first, int64_t count, int64_t D, float* to) {
  if (half_width)
    pack_columns(static_cast<const uint16_t*>(all) + first * D, count, D, to);
  else
    pack_columns(static_cast<const float*>(all) + first * D, count, D, to);
}

inline Words scramble_high(Words x) {
  x = (x ^ (x >> 16)) * 0xE782CA53u;
  return (x ^ (x >> 15)) * 0xB129DA9Bu;
}

// Where each token of a tile stands.
struct Stretch : Span {
  int32_t position[kTile], block[kTile], segment[kTile];

  void fill(const Side& side, int64_t row, int64_t tile, int64_t causal_block) {
    static_cast<Span&>(*this) = side.span(row, tile);
    const int32_t *positions = side.positions_of(row, tile), *segments = side.segments_of(row, tile);
    for (int t = 0; t < kTile; ++t) {
      const int at = std::min(t, count - 1);
      position[t] = positions[at];
      block[t] = causal_block > 1 ? block_of(position[t], causal_block) : position[t];
      segment[t] = segments ? segments[at] : 0;
    }
  }
};

enum class Sight { none, some, all };

// What the tokens of a tile see of one another, judged by what they span: `some` where the spans leave it open.
inline Sight sight(const Rectangle& r, const Span& q, const Span& k) {
  bool reachable = true, open = k.count == kTile;
  if (r.causal_block > 0) {
    reachable &= k.first_block <= q.last_block;
    open &= k.last_block <= q.first_block;
  }
  if (r.window > 0) {
    reachable &= int64_t{q.first} - k.last < r.window;
    open &= int64_t{q.last} - k.first < r.window;
    if (r.causal_block == 0) {
      reachable &= int64_t{k.first} - q.last < r.window;
      open &= int64_t{k.last} - q.first < r.window;
    }
  }
  if (r.query_segments) {
    reachable &= q.least_segment <= k.most_segment && k.least_segment <= q.most_segment;
    reachable &= q.most_segment >= 0 && k.most_segment >= 0;
    open &= q.least_segment == q.most_segment && k.least_segment == k.most_segment;
    open &= q.least_segment == k.least_segment && q.least_segment >= 0;
  }
  return !reachable ? Sight::none : open ? Sight::all : Sight::some;
}

inline bool sees_any(const Rectangle& r, const Span& q, const Span& k) { return sight(r, q, k) != Sight::none; }

// All ones where query t of a tile sees keys s, s + 1, ...
inline Ints shown(const Rectangle& r, const Stretch& q, const Stretch& k, int t, int s) {
  Ints index;
  for (int i = 0; i < kLanes; ++i) index[i] = s + i;
  Ints visible = index < k.count;
  if (r.causal_block > 0) visible &= load(k.block + s) <= q.block[t];
  if (r.window > 0) {
    // Compared without subtracting vectors, which could overflow at the ends of what 32 bits hold.
    const int64_t p = q.position[t];
    const int32_t first = static_cast<int32_t>(std::max<int64_t>(p - r.window + 1, kLeast));
    visible &= load(k.position + s) >= first;
    if (r.causal_block == 0) {
      const int32_t last = static_cast<int32_t>(std::min<int64_t>(p + r.window - 1, kMost));
      visible &= load(k.position + s) <= last;
    }
  }
  if (r.query_segments) visible &= (load(k.segment + s) == q.segment[t]) & all(q.segment[t] >= 0 ? -1 : 0);
  return visible;
}

// A key's part of what decides whether its weights are dropped; the same bits as `ring_rl.kernels.dropout`.
inline void fill_key_bits(const Stretch& k, uint32_t* bits) {
  for (int s = 0; s < kTile; s += kLanes) {
    Words x = scramble_high((Words)load(k.position + s) + 0x61C88647u);
    x ^= x >> 16;
    for (int i = 0; i < kLanes; ++i) bits[s + i] = x[i];
  }
}
inline Ints kept(const Rectangle& r, uint32_t row_bits, const uint32_t* key_bits) {
  return scramble_high(load(key_bits) ^ row_bits) >= all(r.drop_below);
}

}  // namespace ring_rl
