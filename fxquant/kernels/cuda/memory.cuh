// How kernels reach memory: 16 bytes a thread where addresses allow it, grid-stride loops, 64-bit indices.
//
// A kernel is a body that gets its thread's number. A device runs it once per thread; compiled for the host, an entry
// of the same name loops over all threads of a grid, so that tests run the very bodies that devices run.
#pragma once

#include "arithmetic.cuh"

namespace fxq {

// Number of this thread among all of the grid, and how many those are.
struct Thread {
  int64 index;
  int64 count;
};

// Elements of T that one thread takes at a time.
template <typename T>
struct Width {
  static const int value = 16 / (int)sizeof(T);
};

// What moves at once, as words that have one instruction each.
template <int BYTES>
struct Packet;
template <>
struct Packet<1> {
  uint8 words[1];
};
template <>
struct Packet<2> {
  uint16 words[1];
};
template <>
struct alignas(16) Packet<16> {
  uint32 words[4];
};
template <>
struct alignas(8) Packet<8> {
  uint32 words[2];
};
template <>
struct alignas(4) Packet<4> {
  uint32 words[1];
};

// V elements from and to an address that is a multiple of their size.
template <typename T, int V>
FXQ_HD void load(const T* from, T (&to)[V]) {
  *reinterpret_cast<Packet<V * sizeof(T)>*>(to) = *reinterpret_cast<const Packet<V * sizeof(T)>*>(from);
}

template <typename T, int V>
FXQ_HD void store(T* to, const T (&from)[V]) {
  *reinterpret_cast<Packet<V * sizeof(T)>*>(to) = *reinterpret_cast<const Packet<V * sizeof(T)>*>(from);
}

// Where element `index` of a tensor [outer, channels, inner] lies: its channel, and how many of it are still to come.
struct Place {
  int64 channel;
  int64 left;
};

FXQ_HD Place place_of(int64 index, int64 channels, int64 inner) {
  if (((index | inner | channels) >> 32) == 0) {  // a 64-bit division takes a hundred instructions
    uint32 row = (uint32)index / (uint32)inner;
    return Place{(int64)(row % (uint32)channels), (int64)((uint32)inner - ((uint32)index - row * (uint32)inner))};
  }
  int64 row = index / inner;
  return Place{row % channels, inner - (index - row * inner)};
}

// One job over all elements. A thread takes the 16 bytes of a chunk at once, or one after the other where the chunk is
// not whole: cut by the end of the tensor, misaligned, or of several channels.
//
// Job: `V`, `CHANNELS`, `Args` with count, channels, inner and aligned, `By`, which by(args, channel) makes, `Narrow`, the
// same job with V of 1, and begin(args, start), element(i, by), end(args, start), take(narrow).
template <class Job>
FXQ_HD void walk(Job& job, const typename Job::Args& args, Thread at) {
  const int V = Job::V;
  typename Job::By by = Job::by(args, 0);
  Place place = {0, V};
  const int64 chunks = (args.count + V - 1) / V;
  for (int64 chunk = at.index; chunk < chunks; chunk += at.count) {
    const int64 start = chunk * V, live = args.count - start < V ? args.count - start : V;
    if (Job::CHANNELS) {
      place = place_of(start, args.channels, args.inner);
      by = Job::by(args, place.channel);
    }
    if (args.aligned && live == V && place.left >= V) {
      job.begin(args, start);
#pragma unroll
      for (int i = 0; i < V; ++i) job.element(i, by);
      job.end(args, start);
      continue;
    }
#pragma unroll 1
    for (int64 i = start; i < start + live; ++i) {
      typename Job::Narrow one;
      one.begin(args, i);
      one.element(0, by);
      one.end(args, i);
      job.take(one);
      if (Job::CHANNELS && --place.left == 0) {
        place.channel = place.channel + 1 == args.channels ? 0 : place.channel + 1;
        place.left = args.inner;
        by = Job::by(args, place.channel);
      }
    }
  }
}

}  // namespace fxq

#if FXQ_DEVICE
#define FXQ_THREADS 256
#define FXQ_KERNEL extern "C" __global__ void __launch_bounds__(FXQ_THREADS)
#define FXQ_THREAD \
  fxq::Thread { (fxq::int64)blockIdx.x * blockDim.x + threadIdx.x, (fxq::int64)gridDim.x * blockDim.x }
// An entry that walks with one job. The job is the variadic argument, as its template arguments hold commas.
#define FXQ_WALK(NAME, ...)                             \
  FXQ_KERNEL NAME(const __VA_ARGS__::Args args) {       \
    __VA_ARGS__ job;                                    \
    fxq::walk(job, args, FXQ_THREAD);                   \
  }
#define FXQ_BODY(NAME, ARGS, ...) \
  FXQ_KERNEL NAME(const ARGS args) { __VA_ARGS__(args, FXQ_THREAD); }
#else
#define FXQ_KERNEL extern "C" void
#define FXQ_WALK(NAME, ...)                                                              \
  FXQ_KERNEL NAME(const __VA_ARGS__::Args* args, fxq::int64 grid, fxq::int64 block) {    \
    for (fxq::int64 i = 0; i < grid * block; ++i) {                                      \
      __VA_ARGS__ job;                                                                   \
      fxq::walk(job, *args, fxq::Thread{i, grid * block});                               \
    }                                                                                    \
  }
#define FXQ_BODY(NAME, ARGS, ...)                                                                            \
  FXQ_KERNEL NAME(const ARGS* args, fxq::int64 grid, fxq::int64 block) {                                     \
    for (fxq::int64 i = 0; i < grid * block; ++i) __VA_ARGS__(*args, fxq::Thread{i, grid * block});          \
  }
#endif

// Every entry of a file for each dtype; -DFXQ_F32, -DFXQ_F16 or -DFXQ_BF16 compiles those of one.
#if defined(FXQ_F32)
#define FXQ_EACH_DTYPE(ALL) ALL(f32, float)
#elif defined(FXQ_F16)
#define FXQ_EACH_DTYPE(ALL) ALL(f16, fxq::Half)
#elif defined(FXQ_BF16)
#define FXQ_EACH_DTYPE(ALL) ALL(bf16, fxq::Bfloat)
#else
#define FXQ_EACH_DTYPE(ALL) ALL(f32, float) ALL(f16, fxq::Half) ALL(bf16, fxq::Bfloat)
#endif
