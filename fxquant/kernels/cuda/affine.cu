// Affine fake quantization: forward, backward, codes, with a packed mask, with the range of what was read.
#include "memory.cuh"

namespace fxq {

enum ScaleType { SCALE_NUMBER = 0, SCALE_FLOAT32 = 1, SCALE_BFLOAT16 = 2 };
enum PointType { POINT_NUMBER = 0, POINT_INT32 = 1, POINT_INT64 = 2, POINT_FLOAT32 = 3, POINT_FLOAT16 = 4 };

// Mirrored by fxquant/kernels/arguments.py.
struct AffineArgs {
  const void* x;
  const void* grad;
  void* out;
  void* mask;            // bit planes: fxquant.numerics.planes
  float* range;          // [2, grid]: least and largest of what each thread block read
  const void* scale;
  const void* point;
  int64 count;           // elements
  int64 channels;
  int64 inner;           // elements after the channel axis
  int64 row;             // bytes of one row of the mask, a plane of which holds as many elements
  float scale_value;     // where scale_type is SCALE_NUMBER
  int32 point_value;
  int32 scale_type;
  int32 point_type;
  float quant_min;
  float quant_max;
  int32 aligned;         // every address and row is a multiple of what one thread takes
  int32 reserved;
};

FXQ_HD float scale_at(const AffineArgs& args, int64 channel) {
  if (args.scale_type == SCALE_NUMBER) return args.scale_value;
  if (args.scale_type == SCALE_BFLOAT16) return widen(static_cast<const Bfloat*>(args.scale)[channel]);
  return static_cast<const float*>(args.scale)[channel];
}

// Per tensor only the integer part of a floating zero point counts; per channel all of it does.
FXQ_HD void set_point(const AffineArgs& args, int64 channel, bool per_channel, Affine& by) {
  by.point_kind = POINT_INTEGER;
  if (args.point_type == POINT_NUMBER || args.point_type == POINT_INT32) {
    int32 value = args.point_type == POINT_NUMBER ? args.point_value : static_cast<const int32*>(args.point)[channel];
    by.point = (float)value;
    by.wide_point = (double)value;
  } else if (args.point_type == POINT_INT64) {
    int64 value = static_cast<const int64*>(args.point)[channel];
    value = per_channel ? value : (int64)(int32)value;
    by.point = (float)value;
    by.wide_point = (double)value;
  } else {
    bool half = args.point_type == POINT_FLOAT16;
    float value = half ? widen(static_cast<const Half*>(args.point)[channel])
                       : static_cast<const float*>(args.point)[channel];
    by.point = per_channel ? value : (float)(int32)value;
    by.wide_point = (double)by.point;
    if (per_channel) by.point_kind = half ? POINT_HALF : POINT_FLOAT;
  }
}

template <typename T>
struct IsFloat {
  static const bool value = false;
};
template <>
struct IsFloat<float> {
  static const bool value = true;
};

template <typename T, Rounding R, bool C>
FXQ_HD Affine affine_at(const AffineArgs& args, int64 channel) {
  Affine by;
  by.scale = scale_at(args, channel);
  by.inverse = R == RECIPROCAL ? divide(1.0f, by.scale) : 0.0f;
  by.quant_min = args.quant_min;
  by.quant_max = args.quant_max;
  set_point(args, channel, C, by);
  by.wide = C && R == RECIPROCAL && (!IsFloat<T>::value || by.point_kind != POINT_INTEGER);
  return by;
}

template <typename Element, Rounding R, bool C, int WIDTH>
struct AffineJob {
  typedef AffineArgs Args;
  typedef Affine By;
  typedef Element T;
  static const int V = WIDTH;
  static const bool CHANNELS = C;
  static FXQ_HD Affine by(const Args& args, int64 channel) { return affine_at<T, R, C>(args, channel); }

  alignas(16) T x[V];
  FXQ_HD void begin(const Args& args, int64 start) { load(static_cast<const T*>(args.x) + start, x); }
  template <class Narrow>
  FXQ_HD void take(const Narrow&) {}
};

template <typename T, Rounding R, bool C, int V = Width<T>::value>
struct FakeQuantize : AffineJob<T, R, C, V> {
  typedef FakeQuantize<T, R, C, 1> Narrow;
  FXQ_HD void element(int i, const Affine& by) {
    float code = clamp_code(code_before_clamp<R>(widen(this->x[i]), by), by, C && R == RECIPROCAL);
    narrow(dequantize(code, by), this->x[i]);
  }
  FXQ_HD void end(const AffineArgs& args, int64 start) { store(static_cast<T*>(args.out) + start, this->x); }
};

template <typename T, Rounding R, bool C, int V = Width<T>::value>
struct Backward : AffineJob<T, R, C, V> {
  typedef Backward<T, R, C, 1> Narrow;
  alignas(16) T grad[V];
  FXQ_HD void begin(const AffineArgs& args, int64 start) {
    AffineJob<T, R, C, V>::begin(args, start);
    load(static_cast<const T*>(args.grad) + start, grad);
  }
  FXQ_HD void element(int i, const Affine& by) {
    bool pass = inside(code_before_clamp<R>(widen(this->x[i]), by), by);
    narrow(masked(widen(grad[i]), pass), grad[i]);
  }
  FXQ_HD void end(const AffineArgs& args, int64 start) { store(static_cast<T*>(args.out) + start, grad); }
};

// Codes of one byte, int8 or uint8: the same bits.
template <typename T, Rounding R, bool C, int V = Width<T>::value>
struct Quantize : AffineJob<T, R, C, V> {
  typedef Quantize<T, R, C, 1> Narrow;
  alignas(16) uint8 code[V];
  FXQ_HD void element(int i, const Affine& by) {
    float found = clamp_code(code_before_clamp<R>(widen(this->x[i]), by), by, C && R == RECIPROCAL);
    code[i] = (uint8)(int32)found;
  }
  FXQ_HD void end(const AffineArgs& args, int64 start) { store(static_cast<uint8*>(args.out) + start, code); }
};

// Least and largest of what a thread read, NaN if it met one.
struct Range {
  float low;
  float high;
};
FXQ_HD Range no_range() { return Range{infinity(), -infinity()}; }
FXQ_HD Range joined(const Range& a, const Range& b) { return Range{lesser(a.low, b.low), greater(a.high, b.high)}; }

template <typename T, Rounding R, int V = Width<T>::value>
struct Ranged : FakeQuantize<T, R, false, V> {
  typedef Ranged<T, R, 1> Narrow;
  Range range;
  FXQ_HD Ranged() : range(no_range()) {}
  FXQ_HD void begin(const AffineArgs& args, int64 start) {
    FakeQuantize<T, R, false, V>::begin(args, start);
    for (int i = 0; i < V; ++i) range = joined(range, Range{widen(this->x[i]), widen(this->x[i])});
  }
  FXQ_HD void take(const Narrow& one) { range = joined(range, one.range); }
};

// A mask has eight planes: bit k of byte j in a row belongs to element k * row + j of the row. A thread takes bytes
// from `byte` on, and what they say of all eight planes, whose elements begin at `from`.
template <class Job>
FXQ_HD void walk_planes(const AffineArgs& args, Thread at, const Affine& by) {
  const int V = Job::V;
  const int64 pieces = (args.row + V - 1) / V, total = args.count / (8 * args.row) * pieces;
  for (int64 piece = at.index; piece < total; piece += at.count) {
    const int64 row = piece / pieces, start = (piece - row * pieces) * V;
    const int64 live = args.row - start < V ? args.row - start : V;
    const int64 from = row * 8 * args.row + start, byte = row * args.row + start;
    if (args.aligned && live == V) {
      Job::run(args, from, byte, by);
      continue;
    }
#pragma unroll 1
    for (int64 i = 0; i < live; ++i) Job::Narrow::run(args, from + i, byte + i, by);
  }
}

template <typename T, Rounding R, int WIDTH = Width<T>::value>
struct MaskedForward {
  typedef MaskedForward<T, R, 1> Narrow;
  static const int V = WIDTH;
  static FXQ_HD void run(const AffineArgs& args, int64 from, int64 byte, const Affine& by) {
    alignas(16) uint8 mask[V] = {};
#pragma unroll
    for (int plane = 0; plane < 8; ++plane) {
      alignas(16) T x[V];
      const int64 start = from + plane * args.row;
      load(static_cast<const T*>(args.x) + start, x);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float code = code_before_clamp<R>(widen(x[i]), by);
        mask[i] = (uint8)(mask[i] | (inside(code, by) ? 1u << plane : 0u));
        narrow(dequantize(clamp_code(code, by, false), by), x[i]);
      }
      store(static_cast<T*>(args.out) + start, x);
    }
    store(static_cast<uint8*>(args.mask) + byte, mask);
  }
};

template <typename T, int WIDTH = Width<T>::value>
struct MaskedBackward {
  typedef MaskedBackward<T, 1> Narrow;
  static const int V = WIDTH;
  static FXQ_HD void run(const AffineArgs& args, int64 from, int64 byte, const Affine&) {
    alignas(16) uint8 mask[V];
    load(static_cast<const uint8*>(args.mask) + byte, mask);
#pragma unroll
    for (int plane = 0; plane < 8; ++plane) {
      alignas(16) T grad[V];
      const int64 start = from + plane * args.row;
      load(static_cast<const T*>(args.grad) + start, grad);
#pragma unroll
      for (int i = 0; i < V; ++i) narrow(masked(widen(grad[i]), (mask[i] >> plane) & 1), grad[i]);
      store(static_cast<T*>(args.out) + start, grad);
    }
  }
};

template <typename T, Rounding R>
FXQ_HD void forward_with_mask(const AffineArgs& args, Thread at) {
  walk_planes<MaskedForward<T, R>>(args, at, affine_at<T, R, false>(args, 0));
}

template <typename T>
FXQ_HD void backward_from_mask(const AffineArgs& args, Thread at) {
  walk_planes<MaskedBackward<T>>(args, at, Affine{});
}

FXQ_HD void write_range(const AffineArgs& args, int64 block, int64 grid, const Range& found) {
  args.range[block] = found.low;
  args.range[grid + block] = found.high;
}

}  // namespace fxq

// The one thing that host and device do each in their own way: joining the ranges of a thread block.
#if FXQ_DEVICE
template <class Job>
__device__ __forceinline__ void ranged(const fxq::AffineArgs& args) {
  Job job;
  fxq::walk(job, args, FXQ_THREAD);
  fxq::Range mine = job.range;
  __shared__ fxq::Range of_warp[FXQ_THREADS / 32];
  for (int other = 16; other > 0; other /= 2) {
    float low = __shfl_xor_sync(0xFFFFFFFFu, mine.low, other), high = __shfl_xor_sync(0xFFFFFFFFu, mine.high, other);
    mine = fxq::joined(mine, fxq::Range{low, high});
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < (int)blockDim.x / 32; ++warp) mine = fxq::joined(mine, of_warp[warp]);
  fxq::write_range(args, blockIdx.x, gridDim.x, mine);
}
#define FXQ_RANGED(NAME, ...) \
  FXQ_KERNEL NAME(const fxq::AffineArgs args) { ranged<__VA_ARGS__>(args); }
#else
template <class Job>
void ranged(const fxq::AffineArgs& args, fxq::int64 grid, fxq::int64 block) {
  for (fxq::int64 b = 0; b < grid; ++b) {
    fxq::Range found = fxq::no_range();
    for (fxq::int64 t = 0; t < block; ++t) {
      Job job;
      fxq::walk(job, args, fxq::Thread{b * block + t, grid * block});
      found = fxq::joined(found, job.range);
    }
    fxq::write_range(args, b, grid, found);
  }
}
#define FXQ_RANGED(NAME, ...) \
  FXQ_KERNEL NAME(const fxq::AffineArgs* args, fxq::int64 grid, fxq::int64 block) { ranged<__VA_ARGS__>(*args, grid, block); }
#endif

// NAME_<dtype>_<rounding>_<tensor or channel>
#define FXQ_AFFINE(NAME, JOB, SUFFIX, T)                                  \
  FXQ_WALK(NAME##_##SUFFIX##_reciprocal_tensor, JOB<T, fxq::RECIPROCAL, false>) \
  FXQ_WALK(NAME##_##SUFFIX##_reciprocal_channel, JOB<T, fxq::RECIPROCAL, true>) \
  FXQ_WALK(NAME##_##SUFFIX##_divide_tensor, JOB<T, fxq::DIVIDE, false>)         \
  FXQ_WALK(NAME##_##SUFFIX##_divide_channel, JOB<T, fxq::DIVIDE, true>)

#define FXQ_ALL(SUFFIX, T)                                                                                      \
  FXQ_AFFINE(fake_quantize, fxq::FakeQuantize, SUFFIX, T)                                                       \
  FXQ_AFFINE(backward, fxq::Backward, SUFFIX, T)                                                                \
  FXQ_AFFINE(quantize, fxq::Quantize, SUFFIX, T)                                                                \
  FXQ_RANGED(ranged_##SUFFIX##_reciprocal, fxq::Ranged<T, fxq::RECIPROCAL>)                                     \
  FXQ_RANGED(ranged_##SUFFIX##_divide, fxq::Ranged<T, fxq::DIVIDE>)                                             \
  FXQ_BODY(masked_##SUFFIX##_reciprocal, fxq::AffineArgs, fxq::forward_with_mask<T, fxq::RECIPROCAL>)           \
  FXQ_BODY(masked_##SUFFIX##_divide, fxq::AffineArgs, fxq::forward_with_mask<T, fxq::DIVIDE>)                   \
  FXQ_BODY(masked_backward_##SUFFIX, fxq::AffineArgs, fxq::backward_from_mask<T>)

FXQ_EACH_DTYPE(FXQ_ALL)
