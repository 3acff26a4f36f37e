// What XLA calls: checks of shapes, and threads for the pieces of work.

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "attention.h"
#include "xla/ffi/api/ffi.h"

namespace ring_rl {
namespace {

namespace ffi = xla::ffi;

ffi::Error no_memory() { return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for tiles of scores"); }

// Runs all pieces of `work` on the caller's thread, helped by whatever threads of XLA's pool are free meanwhile. The
// caller never waits for a piece that nobody has begun: with a ring of devices on one machine the pool's threads may
// all be busy, or waiting for what this very call computes. No exception leaves it: XLA is built without them.
template <typename Work>
ffi::Error run(Work work, ffi::ThreadPool& pool) {
  struct Progress {
    Work work;
    int64_t pieces;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable idle;
    int busy = 0;
    bool out_of_memory = false;

    void help() {
      {
        std::lock_guard<std::mutex> lock(mutex);
        ++busy;
      }
      bool failed = false;
      try {
        for (int64_t i; (i = next.fetch_add(1)) < pieces;) work.piece(i);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      std::lock_guard<std::mutex> lock(mutex);
      out_of_memory |= failed;
      if (--busy == 0) idle.notify_all();
    }
  };
  // Helpers that come late find nothing left to do: they hold this, and touch none of the call's arrays.
  std::shared_ptr<Progress> progress;
  try {
    progress = std::make_shared<Progress>();
    progress->work = std::move(work);
    progress->work.prepare();
    progress->pieces = progress->work.pieces();
  } catch (const std::bad_alloc&) {
    return no_memory();
  }
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), progress->pieces) - 1;
  try {
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([progress] { progress->help(); });
  } catch (const std::bad_alloc&) {
    // So many helpers it is then; those that are there work on this call's arrays, which must not go before them.
  }
  progress->help();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->idle.wait(lock, [&] { return progress->busy == 0; });
  return progress->out_of_memory ? no_memory() : ffi::Error::Success();
}

using Any = ffi::AnyBuffer;
using Int32 = ffi::Buffer<ffi::S32>;
using UInt32 = ffi::Buffer<ffi::U32>;
using Float32 = ffi::Buffer<ffi::F32>;

// Product of all dimensions but the last `trailing`: the axes that vmap added, and the batch.
template <typename Buffer>
int64_t leading(const Buffer& x, size_t trailing) {
  int64_t count = 1;
  for (size_t i = 0; i + trailing < x.dimensions().size(); ++i) count *= x.dimensions()[i];
  return count;
}
template <typename Buffer>
int64_t from_last(const Buffer& x, size_t i) {
  return x.dimensions()[x.dimensions().size() - i];
}
// How many of `rows` share each of what x has one row of; 0 where they cannot.
template <typename Buffer>
int64_t rows_a_row(int64_t rows, const Buffer& x) {
  const int64_t own = leading(x, 1);
  return own > 0 && rows % own == 0 ? rows / own : 0;
}
template <typename Value, typename Buffer>
const Value* unless_empty(const Buffer& x) {
  return x.element_count() ? x.typed_data() : nullptr;
}

struct Options {
  float scale, soft_cap, kept_scale;
  uint32_t drop_below;
  int64_t causal_block, window;
};

ffi::ErrorOr<Rectangle> rectangle(const Any& q, const Any& k, const Any& v, const Int32& query_positions,
                                  const Int32& key_positions, const Int32& query_segments, const Int32& key_segments,
                                  const Float32& slopes, const UInt32& row_bits, const Options& options) {
  const auto refuse = [](const char* what) { return ffi::Unexpected(ffi::Error::InvalidArgument(what)); };
  const bool half_width = q.element_type() == ffi::BF16;
  if (!half_width && q.element_type() != ffi::F32) return refuse("q must be float32 or bfloat16");
  if (k.element_type() != q.element_type() || v.element_type() != q.element_type())
    return refuse("q, k and v must be of one dtype");
  if (q.dimensions().size() < 4 || k.dimensions().size() < 4 || v.dimensions().size() < 4)
    return refuse("q, k and v must be [batch, heads, tokens, D]");
  if (query_positions.dimensions().size() < 2 || key_positions.dimensions().size() < 2 ||
      slopes.dimensions().size() < 2)
    return refuse("positions and slopes must be [b, tokens] and [b, H]");
  Rectangle r{};
  r.rows = leading(q, 3), r.query_heads = from_last(q, 3), r.T = from_last(q, 2), r.D = from_last(q, 1);
  r.key_heads = from_last(k, 3), r.S = from_last(k, 2);
  r.q = q.untyped_data(), r.k = k.untyped_data(), r.v = v.untyped_data(), r.half_width = half_width;
  r.query_positions = query_positions.typed_data(), r.key_positions = key_positions.typed_data();
  r.query_segments = unless_empty<int32_t>(query_segments), r.key_segments = unless_empty<int32_t>(key_segments);
  r.slopes = unless_empty<float>(slopes), r.row_bits = unless_empty<uint32_t>(row_bits);
  r.scale = options.scale, r.soft_cap = options.soft_cap, r.kept_scale = options.kept_scale;
  r.drop_below = options.drop_below, r.causal_block = options.causal_block, r.window = options.window;
  for (const int64_t size : {r.rows, r.query_heads, r.key_heads, r.T, r.S, r.D})
    if (size == 0) return refuse("q and k must not be empty");
  if (leading(k, 3) != r.rows || from_last(k, 1) != r.D || v.element_count() != k.element_count() ||
      from_last(v, 2) != r.S)
    return refuse("k and v must be [batch, key heads, S, D] with the batch and D of q");
  if (r.query_heads % r.key_heads) return refuse("key heads must divide query heads");
  r.rows_a_query_position = rows_a_row(r.rows, query_positions);
  r.rows_a_key_position = rows_a_row(r.rows, key_positions);
  if (from_last(query_positions, 1) != r.T || from_last(key_positions, 1) != r.S || !r.rows_a_query_position ||
      !r.rows_a_key_position)
    return refuse("positions must be [b, T] and [b, S] with b = 1 or the batch");
  if (!r.query_segments != !r.key_segments)
    return refuse("segment ids are needed for queries and keys, or for neither");
  if (r.query_segments && (query_segments.element_count() != static_cast<size_t>(r.rows * r.T) ||
                           key_segments.element_count() != static_cast<size_t>(r.rows * r.S)))
    return refuse("segment ids must be [batch, T] and [batch, S]");
  if (r.slopes) {
    r.rows_a_slope = rows_a_row(r.rows, slopes);
    if (from_last(slopes, 1) != r.query_heads || !r.rows_a_slope) return refuse("slopes must be [b, H]");
  }
  if (r.drop_below && row_bits.element_count() != static_cast<size_t>(r.rows * r.query_heads * r.T))
    return refuse("dropout needs random bits of each row, [batch, H, T]");
  return r;
}

ffi::Error forward(ffi::ThreadPool pool, Any q, Any k, Any v, Int32 query_positions, Int32 key_positions,
                   Int32 query_segments, Int32 key_segments, Float32 slopes, UInt32 row_bits,
                   ffi::Result<Float32> out, ffi::Result<Float32> log_sum_exp, float scale, float soft_cap,
                   float kept_scale, uint32_t drop_below, int64_t causal_block, int64_t window) {
  const auto r = rectangle(q, k, v, query_positions, key_positions, query_segments, key_segments, slopes, row_bits,
                           {scale, soft_cap, kept_scale, drop_below, causal_block, window});
  if (!r) return r.error();
  if (out->element_count() != q.element_count() ||
      log_sum_exp->element_count() != static_cast<size_t>(r->rows * r->query_heads * r->T))
    return ffi::Error::InvalidArgument("results must be [batch, H, T, D] and [batch, H, T]");
  return run(Forward{*r, out->typed_data(), log_sum_exp->typed_data(), {}, {}}, pool);
}

ffi::Error backward(ffi::ThreadPool pool, Any q, Any k, Any v, Int32 query_positions, Int32 key_positions,
                    Int32 query_segments, Int32 key_segments, Float32 slopes, UInt32 row_bits, Any d_out,
                    Float32 log_sum_exp, Float32 delta, ffi::Result<Float32> dq, ffi::Result<Float32> dk,
                    ffi::Result<Float32> dv, float scale, float soft_cap, float kept_scale, uint32_t drop_below,
                    int64_t causal_block, int64_t window, int64_t shares) {
  const auto r = rectangle(q, k, v, query_positions, key_positions, query_segments, key_segments, slopes, row_bits,
                           {scale, soft_cap, kept_scale, drop_below, causal_block, window});
  if (!r) return r.error();
  const auto wide = [&](size_t count) { return count == static_cast<size_t>(r->rows * r->query_heads * r->T); };
  if (d_out.element_type() != ffi::F32 && d_out.element_type() != ffi::BF16)
    return ffi::Error::InvalidArgument("d_out must be float32 or bfloat16");
  if (d_out.element_count() != q.element_count() || !wide(log_sum_exp.element_count()) || !wide(delta.element_count()))
    return ffi::Error::InvalidArgument("d_out must be [batch, H, T, D], log_sum_exp and delta [batch, H, T]");
  if (shares < 1 || dq->element_count() != q.element_count() * static_cast<size_t>(shares) ||
      dk->element_count() != k.element_count() || dv->element_count() != k.element_count())
    return ffi::Error::InvalidArgument("results must be [batch, shares, H, T, D] and twice [batch, K, S, D]");
  return run(Backward{*r, d_out.untyped_data(), d_out.element_type() == ffi::BF16, log_sum_exp.typed_data(),
                      delta.typed_data(), shares, dq->typed_data(), dk->typed_data(), dv->typed_data(), {}, {}},
             pool);
}

}  // namespace
}  // namespace ring_rl

XLA_FFI_DEFINE_HANDLER_SYMBOL(ring_rl_attention_forward, ring_rl::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<ring_rl::Any>()
                                  .Arg<ring_rl::Any>()
                                  .Arg<ring_rl::Any>()
                                  .Arg<ring_rl::Int32>()
                                  .Arg<ring_rl::Int32>()
                                  .Arg<ring_rl::Int32>()
                                  .Arg<ring_rl::Int32>()
                                  .Arg<ring_rl::Float32>()
                                  .Arg<ring_rl::UInt32>()
                                  .Ret<ring_rl::Float32>()
                                  .Ret<ring_rl::Float32>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<float>("kept_scale")
                                  .Attr<uint32_t>("drop_below")
                                  .Attr<int64_t>("causal_block")
                                  .Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ring_rl_attention_backward, ring_rl::backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<ring_rl::Any>()
                                  .Arg<ring_rl::Any>()
                                  .Arg<ring_rl::Any>()
                                  .Arg<ring_rl::Int32>()
                                  .Arg<ring_rl::Int32>()
                                  .Arg<ring_rl::Int32>()
                                  .Arg<ring_rl::Int32>()
                                  .Arg<ring_rl::Float32>()
                                  .Arg<ring_rl::UInt32>()
                                  .Arg<ring_rl::Any>()
                                  .Arg<ring_rl::Float32>()
                                  .Arg<ring_rl::Float32>()
                                  .Ret<ring_rl::Float32>()
                                  .Ret<ring_rl::Float32>()
                                  .Ret<ring_rl::Float32>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<float>("kept_scale")
                                  .Attr<uint32_t>("drop_below")
                                  .Attr<int64_t>("causal_block")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("shares"));
