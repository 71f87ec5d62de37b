// Small floats by one scale per tensor or per channel, as values and as bytes; and by one scale per block.
#include "memory.cuh"

namespace fxq {

// Mirrored by fxquant/kernels/arguments.py.
struct FloatArgs {
  const void* x;
  void* out;
  const float* scale;  // null: 1, and neither divided by nor multiplied with
  int64 count;
  int64 channels;
  int64 inner;
  FloatGrid grid;
  int32 aligned;
};

struct FloatScale {
  float scale;
  bool scaled;
  FloatGrid grid;
};

template <typename Element, bool C, int WIDTH>
struct FloatJob {
  typedef FloatArgs Args;
  typedef FloatScale By;
  typedef Element T;
  static const int V = WIDTH;
  static const bool CHANNELS = C;
  static FXQ_HD By by(const Args& args, int64 channel) {
    return By{args.scale ? args.scale[channel] : 1.0f, args.scale != nullptr, args.grid};
  }

  alignas(16) T x[V];
  FXQ_HD void begin(const Args& args, int64 start) { load(static_cast<const T*>(args.x) + start, x); }
  template <class Narrow>
  FXQ_HD void take(const Narrow&) {}
};

template <typename T>
FXQ_HD float rounded(T x, const FloatScale& by) {
  return round_to_float(by.scaled ? divide(widen(x), by.scale) : widen(x), by.grid);
}

template <typename T, bool C, int V = Width<T>::value>
struct FakeQuantizeFloat : FloatJob<T, C, V> {
  typedef FakeQuantizeFloat<T, C, 1> Narrow;
  FXQ_HD void element(int i, const FloatScale& by) {
    float y = rounded(this->x[i], by);
    narrow(by.scaled ? mul(y, by.scale) : y, this->x[i]);
  }
  FXQ_HD void end(const FloatArgs& args, int64 start) { store(static_cast<T*>(args.out) + start, this->x); }
};

// Bytes of float8_e4m3fn or float8_e5m2.
template <typename T, bool C, int V = Width<T>::value>
struct QuantizeFloat : FloatJob<T, C, V> {
  typedef QuantizeFloat<T, C, 1> Narrow;
  alignas(16) uint8 code[V];
  FXQ_HD void element(int i, const FloatScale& by) {
    code[i] = float8_bits(rounded(this->x[i], by), by.grid);
  }
  FXQ_HD void end(const FloatArgs& args, int64 start) { store(static_cast<uint8*>(args.out) + start, code); }
};

enum BlockScale { SCALE_MX = 0, SCALE_MX_CEIL = 1, SCALE_FULL = 2, SCALE_FLOAT = 3 };

// Mirrored by fxquant/kernels/arguments.py.
struct BlockArgs {
  const void* x;
  void* out;
  const float* tensor_amax;  // of one element, for SCALE_FLOAT
  int64 count;
  Element element;
  FloatGrid scales;          // the format of scales, for SCALE_FLOAT
  float unit;                // 2^-emax of the element
  float reach;               // element.max * scales.max
  int32 lanes;               // threads that share a block: a power of two, at most 32
  int32 mode;
  int32 aligned;
};

// A thread's part of a block, 16 bytes.
template <typename T>
struct Piece {
  static const int V = Width<T>::value;
  alignas(16) T x[V];

  FXQ_HD float read(const BlockArgs& args, int64 piece) {
    const T* from = static_cast<const T*>(args.x) + piece * V;
    if (args.aligned) {
      load(from, x);
    } else {
      for (int i = 0; i < V; ++i) x[i] = from[i];
    }
    float amax = 0.0f;
    for (int i = 0; i < V; ++i) amax = greater(amax, fabsf(widen(x[i])));
    return amax;
  }
  FXQ_HD void write(const BlockArgs& args, int64 piece, float amax) {
    const bool mx = args.mode <= SCALE_MX_CEIL;
    float scale;
    if (mx) {
      scale = mx_scale(amax, args.element, args.unit, args.mode == SCALE_MX_CEIL);
    } else if (args.mode == SCALE_FULL) {
      scale = finite_scale(divide(amax, args.element.max));
    } else {
      scale = quantized_scale(amax, scale_unit(*args.tensor_amax, args.reach), args.element, args.scales);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float value = widen(x[i]);
      narrow(mx ? mx_value(value, scale, args.element) : block_value(value, scale, args.element), x[i]);
    }
    T* to = static_cast<T*>(args.out) + piece * V;
    if (args.aligned) {
      store(to, x);
    } else {
      for (int i = 0; i < V; ++i) to[i] = x[i];
    }
  }
};

}  // namespace fxq

// The one thing that host and device do each in their own way: the largest of the threads that share a block.
#if FXQ_DEVICE
template <typename T>
__device__ __forceinline__ void blocks(const fxq::BlockArgs& args, fxq::Thread at) {
  const fxq::int64 pieces = args.count / fxq::Piece<T>::V;
  // A warp goes on until its first thread is at the end, so that all of it takes part in the exchange.
  for (fxq::int64 piece = at.index; piece - (fxq::int64)(threadIdx.x % 32) < pieces; piece += at.count) {
    fxq::Piece<T> part;
    float amax = piece < pieces ? part.read(args, piece) : 0.0f;
    for (int other = args.lanes / 2; other > 0; other /= 2)
      amax = fxq::greater(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, other));
    if (piece < pieces) part.write(args, piece, amax);
  }
}
#define FXQ_BLOCKS(NAME, T) \
  FXQ_KERNEL NAME(const fxq::BlockArgs args) { blocks<T>(args, FXQ_THREAD); }
#else
template <typename T>
void blocks(const fxq::BlockArgs& args, fxq::int64 grid, fxq::int64 block) {
  const fxq::int64 pieces = args.count / fxq::Piece<T>::V, threads = grid * block;
  for (fxq::int64 i = 0; i < threads; i += args.lanes)
    for (fxq::int64 first = i; first < pieces; first += threads) {
      fxq::Piece<T> parts[32];
      float amax = 0.0f;
      for (int lane = 0; lane < args.lanes; ++lane) amax = fxq::greater(amax, parts[lane].read(args, first + lane));
      for (int lane = 0; lane < args.lanes; ++lane) parts[lane].write(args, first + lane, amax);
    }
}
#define FXQ_BLOCKS(NAME, T) \
  FXQ_KERNEL NAME(const fxq::BlockArgs* args, fxq::int64 grid, fxq::int64 block) { blocks<T>(*args, grid, block); }
#endif

#define FXQ_ALL(SUFFIX, T)                                                  \
  FXQ_WALK(fake_quantize_float_##SUFFIX##_tensor, fxq::FakeQuantizeFloat<T, false>)   \
  FXQ_WALK(fake_quantize_float_##SUFFIX##_channel, fxq::FakeQuantizeFloat<T, true>)   \
  FXQ_WALK(quantize_float_##SUFFIX##_tensor, fxq::QuantizeFloat<T, false>)            \
  FXQ_WALK(quantize_float_##SUFFIX##_channel, fxq::QuantizeFloat<T, true>)            \
  FXQ_BLOCKS(blocks_##SUFFIX, T)

FXQ_EACH_DTYPE(FXQ_ALL)
