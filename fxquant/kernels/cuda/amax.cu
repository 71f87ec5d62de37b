// Quantizers by a largest magnitude, per tensor or per channel: integer codes and small floats (fxquant.numerics.amax).
#include "memory.cuh"

namespace fxq {

// Mirrored by fxquant/kernels/arguments.py.
struct AmaxArgs {
  const void* x;
  void* out;
  const float* amax;  // null: small floats as they are, scaled by nothing
  int64 count;
  int64 channels;
  int64 inner;
  FloatGrid grid;     // where `floating`
  float lowest;       // else the range of codes
  float bound;
  int32 floating;
  int32 aligned;
};

struct AmaxScale {
  float scale;   // onto the codes
  float back;    // off them: codes are divided by `scale`, floats multiplied with this
  float lowest;
  float bound;
  bool nothing;  // an amax so small that all is 0
  bool scaled;
  bool floating;
  FloatGrid grid;
};

FXQ_HD AmaxScale amax_scale(const AmaxArgs& args, int64 channel) {
  const float epsilon = from_bits(103u << 23);  // 2^-24
  AmaxScale by = {1.0f, 1.0f, args.lowest, args.bound, false, args.amax != nullptr, args.floating != 0, args.grid};
  if (!by.scaled) return by;
  float amax = args.amax[channel];
  by.nothing = amax <= epsilon;
  float reach = by.nothing ? 1.0f : amax;
  if (by.floating) {
    by.scale = divide(args.grid.max, reach);
    by.back = divide(reach, args.grid.max);
  } else if (!by.nothing) {
    by.scale = divide(args.bound, amax);
  }
  return by;
}

FXQ_HD float amax_value(float x, const AmaxScale& by) {
  if (by.floating) {
    if (!by.scaled) return round_to_float(x, by.grid);
    return mul(round_to_float(mul(x, by.scale), by.grid), by.back);
  }
  float code = round_even(mul(x, by.scale));
  code = code < by.lowest ? by.lowest : code;  // NaN stays
  code = code > by.bound ? by.bound : code;
  return divide(by.nothing ? 0.0f : code, by.scale);
}

template <typename Element, bool C, int WIDTH = Width<Element>::value>
struct ByAmax {
  typedef AmaxArgs Args;
  typedef AmaxScale By;
  typedef ByAmax<Element, C, 1> Narrow;
  typedef Element T;
  static const int V = WIDTH;
  static const bool CHANNELS = C;
  static FXQ_HD By by(const Args& args, int64 channel) { return amax_scale(args, channel); }

  alignas(16) T x[V];
  FXQ_HD void begin(const Args& args, int64 start) { load(static_cast<const T*>(args.x) + start, x); }
  FXQ_HD void element(int i, const By& by) { narrow(amax_value(widen(x[i]), by), x[i]); }
  FXQ_HD void end(const Args& args, int64 start) { store(static_cast<T*>(args.out) + start, x); }
  FXQ_HD void take(const Narrow&) {}
};

}  // namespace fxq

#define FXQ_ALL(SUFFIX, T)                                \
  FXQ_WALK(amax_##SUFFIX##_tensor, fxq::ByAmax<T, false>) \
  FXQ_WALK(amax_##SUFFIX##_channel, fxq::ByAmax<T, true>)

FXQ_EACH_DTYPE(FXQ_ALL)
