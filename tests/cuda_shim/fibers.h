// CUDA threads as fibers of one OS thread. A barrier switches to the next fiber, so a block of 128
// threads costs a few hundred nanoseconds per barrier instead of the 0.4 ms of as many OS threads.
// Both sanitizers are told about the switches: AddressSanitizer of the stacks, and ThreadSanitizer
// that a fiber is a thread of its own which is ordered with the others by barriers alone, so a
// missing barrier is reported as a data race whatever the order the fibers happen to run in.
//
// The blocks of a cluster run together, clusters one after the other. Every block has a shared
// memory of exactly the bytes asked for, full of NaN.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace mdk::shim {

struct Barrier {
  int size = 0, arrived = 0;
  unsigned generation = 0;
  char order[2] = {};  // what ThreadSanitizer orders through, by parity of the generation
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][32];  // what shuffles exchange, in turns
};

struct Cluster;

struct Block {
  int64_t index, grid_blocks;
  int rank, threads;
  char* shared;
  size_t shared_bytes;
  Barrier barrier;
  std::vector<Warp> warps;
  Cluster* cluster;
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
  int size() const { return static_cast<int>(blocks.size()); }
};

struct Copy {
  void* shared;
  const void* global;
  int group;
};

struct Fiber {
  int thread;
  Block* block;
  Warp* warp;
  std::vector<Copy> copies;
  int groups;
  int exchanges;
  bool arrived;  // at the cluster's barrier, and has not waited there (tests/ptx)
  bool finished;
  const Barrier* waits_at;  // until its generation is no longer this one
  unsigned generation;
  bool starts;       // has no context yet
  void* context[5];  // of __builtin_setjmp
  char* stack;
  void* asan_stack;
  void* tsan_fiber;
};

extern Fiber* self;  // the running one

void wait(Barrier& barrier);

// Runs kernel() in every thread of the grid. Throws std::runtime_error when threads wait at
// barriers that the others never reach.
void run_grid(int64_t blocks, int cluster, int threads, size_t shared_bytes,
              const std::function<void()>& kernel);

}  // namespace mdk::shim
