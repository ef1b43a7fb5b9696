// From an algorithm written for any matrix to kernels: which tier and tile a problem takes, the kernel around it, and its
// launch. An algorithm is a class template over the matrix, with Params, State and run(index): see forward.cuh.
#pragma once

#include "sinkhorn/launch_cuda.h"
#include "sinkhorn/memory_matrix.cuh"
#include "sinkhorn/register_matrix.cuh"

namespace otface::sinkhorn {

template <class... Matrices>
struct Tiles {};

// The tiles of the register tier, smallest first. What is not listed takes the shared tier.
template <class T>
struct ForwardTiles;
template <>
struct ForwardTiles<float> {
  using List = Tiles<RegisterMatrix<float, 4, 4, 4, 4>,    // up to 16 x 16, two problems per warp
                     RegisterMatrix<float, 4, 4, 8, 8>,    //       32 x 32, two
                     RegisterMatrix<float, 4, 4, 13, 13>,  //       52 x 52, two: the 7 x 7 maps of faces
                     RegisterMatrix<float, 4, 8, 16, 8>>;  //       64 x 64, one
};
template <>
struct ForwardTiles<double> {
  using List = Tiles<RegisterMatrix<double, 4, 4, 4, 4>,    // up to 16 x 16, two
                     RegisterMatrix<double, 4, 8, 8, 4>,    //       32 x 32, one
                     RegisterMatrix<double, 4, 8, 12, 6>>;  //       48 x 48, one
};
// The reverse keeps a second tile of the same size, the sum of its outer products; one problem per warp.
template <class T>
struct UnrolledTiles;
template <>
struct UnrolledTiles<float> {
  using List = Tiles<RegisterMatrix<float, 4, 8, 4, 2>,    // up to 16 x 16
                     RegisterMatrix<float, 4, 8, 8, 4>,    //       32 x 32
                     RegisterMatrix<float, 4, 8, 13, 7>>;  //       52 x 56
};
template <>
struct UnrolledTiles<double> {
  using List = Tiles<RegisterMatrix<double, 4, 8, 4, 2>,   // up to 16 x 16
                     RegisterMatrix<double, 4, 8, 8, 4>>;  //       32 x 32
};

constexpr int kSharedThreads = kOwners, kMostSharedThreads = 512;
constexpr size_t kReservedBytes = 1024;  // of shared memory, that a block takes beside what it asks for
constexpr int kMostStreamThreads = 512;
// A block of 256 threads holds 8 columns per thread in registers up to this width; wider rows take 512 threads.
inline int stream_threads(int64_t m) { return m <= 256 * kColumnsPerThread ? 256 : kMostStreamThreads; }

// --- the kernels: one team each for every problem, in the tier's way ---

template <class Algorithm>
__global__ void __launch_bounds__(32, 8)
    solve_in_registers(const __grid_constant__ typename Algorithm::Params params, int team_bytes) {
  using M = typename Algorithm::Matrix;
  const Problems& all = params.problems;
  Arena arena{simt::shared_memory() + M::team_in_block() * team_bytes};
  auto* problem = arena.take<Problem>(1);
  typename Algorithm::State state(arena, all.n, all.m, 32);
  M matrix(*problem, state.matrix);
  Algorithm(matrix, state, *problem, params).run(simt::block_index() * M::teams_per_block + M::team_in_block());
}

template <class Algorithm>
__global__ void __launch_bounds__(kMostSharedThreads, 1)
    solve_in_shared(const __grid_constant__ typename Algorithm::Params params) {
  using M = typename Algorithm::Matrix;
  const Problems& all = params.problems;
  Arena arena{simt::shared_memory()};
  auto* scratch = arena.take<typename M::Scratch>(1);
  auto* problem = arena.take<Problem>(1);
  typename Algorithm::State state(arena, all.n, all.m, simt::block_threads());
  M matrix(*problem, state.matrix, scratch, {}, nullptr, 0, 1);
  Algorithm(matrix, state, *problem, params).run(simt::block_index());
}

// Gang g takes the problems g, g + gangs, ..
template <class Algorithm>
__global__ void __launch_bounds__(kMostStreamThreads, 1)
    solve_in_stream(const __grid_constant__ typename Algorithm::Params params, char* workspace, int gang_blocks,
                    int64_t gang_bytes, bool has_ring) {
  using M = typename Algorithm::Matrix;
  const Problems& all = params.problems;
  const int64_t gang = simt::block_index() / gang_blocks, gangs = simt::grid_blocks() / gang_blocks;
  auto* meetings = reinterpret_cast<typename M::Meeting*>(workspace);
  Arena arena{workspace + gangs * static_cast<int64_t>(sizeof(typename M::Meeting)) + gang * gang_bytes};
  Arena shared{simt::shared_memory()};
  auto* scratch = shared.take<typename M::Scratch>(1);
  auto* problem = shared.take<Problem>(1);
  typename M::Ring ring;
  if (has_ring) ring.k = shared.take<typename M::T>(M::Ring::entries(simt::block_threads()));
  typename Algorithm::State state(arena, all.n, all.m, simt::block_threads());
  M matrix(*problem, state.matrix, scratch, ring, meetings + gang, static_cast<int>(simt::block_index() % gang_blocks),
           gang_blocks);
  for (int64_t index = gang; index < all.batch; index += gangs) {
    Algorithm(matrix, state, *problem, params).run(index);
    matrix.sync();  // the team's memory is free for the next problem
  }
}

// --- choice and launch ---

template <template <class> class Algorithm, class T, class TileList>
class Launcher;

template <template <class> class Algorithm, class T, class... RegisterMatrices>
class Launcher<Algorithm, T, Tiles<RegisterMatrices...>> {
 public:
  using InShared = Algorithm<MemoryMatrix<T, false>>;
  using InStream = Algorithm<MemoryMatrix<T, true>>;
  using Params = typename InShared::Params;

  static KernelChoice choice(const Params& params, Tier tier) {
    return visit(params, tier, [](const auto& way) { return way.choice; });
  }
  static const char* launch(const Params& params, void* workspace, simt::Stream stream, Tier tier) {
    if (params.problems.batch == 0) return "";
    return visit(params, tier,
                 [&](const auto& way) { return way.launch(params, static_cast<char*>(workspace), stream); });
  }

 private:
  // One way to solve: what there is to know about it, and how it is started.
  template <class A>
  struct InRegistersWay {
    KernelChoice choice;
    int64_t team_bytes = 0;
    InRegistersWay(const Problems& p, const simt::Limits&) {
      using M = typename A::Matrix;
      choice.tile_rows = M::tile_rows;
      choice.tile_cols = M::tile_cols;
      choice.threads_per_problem = M::lanes;
      choice.problems_per_block = M::teams_per_block;
      Arena arena{nullptr};
      arena.take<Problem>(1);
      [[maybe_unused]] const typename A::State state(arena, p.n, p.m, 32);
      team_bytes = static_cast<int64_t>(arena.used);
      choice.shared_bytes = arena.used * M::teams_per_block;
      choice.registers = simt::registers_of(solve_in_registers<A>);
      choice.tier = Tier::registers;
    }
    const char* launch(const Params& params, char*, simt::Stream stream) const {
      const int64_t blocks = (params.problems.batch + choice.problems_per_block - 1) / choice.problems_per_block;
      return simt::launch(solve_in_registers<A>, {blocks, 32, choice.shared_bytes}, stream, params,
                          static_cast<int>(team_bytes));
    }
  };
  struct InSharedWay {
    KernelChoice choice;
    InSharedWay(const Problems& p, const simt::Limits& limits) {
      choice.threads_per_problem = kSharedThreads;
      choice.shared_bytes = bytes_needed(p, kSharedThreads);
      // Where a multiprocessor has no room for a second block, the first one has twice as many threads.
      const size_t of_twice = bytes_needed(p, kMostSharedThreads);
      if (2 * (choice.shared_bytes + kReservedBytes) > static_cast<size_t>(limits.shared_bytes_per_multiprocessor) &&
          of_twice <= static_cast<size_t>(limits.shared_bytes_per_block)) {
        choice.threads_per_problem = kMostSharedThreads;
        choice.shared_bytes = of_twice;
      }
      choice.registers = simt::registers_of(solve_in_shared<InShared>);
      choice.tier =
          choice.shared_bytes <= static_cast<size_t>(limits.shared_bytes_per_block) ? Tier::shared : Tier::any;
    }
    static size_t bytes_needed(const Problems& p, int threads) {
      Arena arena{nullptr};
      arena.take<typename InShared::Matrix::Scratch>(1);
      arena.take<Problem>(1);
      [[maybe_unused]] const typename InShared::State state(arena, p.n, p.m, threads);
      return arena.used;
    }
    const char* launch(const Params& params, char*, simt::Stream stream) const {
      if (choice.tier == Tier::any) return "the problem is too large for the shared memory of a block";
      return simt::launch(solve_in_shared<InShared>,
                          {params.problems.batch, choice.threads_per_problem, choice.shared_bytes}, stream, params);
    }
  };
  struct InStreamWay {
    using Meeting = typename InStream::Matrix::Meeting;
    KernelChoice choice;
    int64_t gangs = 0, gang_bytes = 0;
    int threads = 0;
    bool has_ring = false;
    InStreamWay(const Problems& p, const simt::Limits& limits) {
      threads = stream_threads(p.m);
      Arena shared{nullptr};
      shared.take<typename InStream::Matrix::Scratch>(1);
      shared.take<Problem>(1);
      choice.shared_bytes = shared.used;
      using M = typename InStream::Matrix;
      shared.take<typename M::T>(M::Ring::entries(threads));
      has_ring = sizeof(typename M::T) == 4 && p.m <= threads * kColumnsPerThread &&
                 shared.used <= static_cast<size_t>(limits.shared_bytes_per_block);
      if (has_ring) choice.shared_bytes = shared.used;
      Arena arena{nullptr};
      [[maybe_unused]] const typename InStream::State state(arena, p.n, p.m, threads);
      gang_bytes = static_cast<int64_t>((arena.used + 255) / 256 * 256);
      const int64_t resident =
          simt::resident_blocks(solve_in_stream<InStream>, {1, threads, choice.shared_bytes, true});
      if (resident == 0 || p.batch == 0) return;
      // As many problems at a time as memory is spent on, and the blocks shared among them.
      const int64_t affordable = limits.workspace_bytes > gang_bytes ? limits.workspace_bytes / gang_bytes : 1;
      const int64_t wanted = least_of(least_of(p.batch, affordable), resident);
      choice.blocks_per_problem = static_cast<int>(least_of(most_stripes(true, p.n), resident / wanted));
      gangs = least_of(wanted, resident / choice.blocks_per_problem);
      choice.threads_per_problem = threads * choice.blocks_per_problem;
      choice.workspace_bytes = static_cast<size_t>(gangs * (gang_bytes + static_cast<int64_t>(sizeof(Meeting))));
      choice.registers = simt::registers_of(solve_in_stream<InStream>);
      choice.tier = Tier::stream;
    }
    const char* launch(const Params& params, char* workspace, simt::Stream stream) const {
      if (choice.tier == Tier::any) return "no CUDA device can run the kernel";
      const char* error = simt::fill_zero(workspace, static_cast<size_t>(gangs) * sizeof(Meeting), stream);
      if (*error != 0) return error;
      return simt::launch(solve_in_stream<InStream>,
                          {gangs * choice.blocks_per_problem, threads, choice.shared_bytes, true}, stream, params,
                          workspace, choice.blocks_per_problem, gang_bytes, has_ring);
    }
  };

  // use(way) for the first way that fits, or for the one of `tier`.
  template <class Use>
  static auto visit(const Params& params, Tier tier, Use use) {
    using Result = decltype(use(std::declval<const InSharedWay&>()));
    const Problems& p = params.problems;
    const simt::Limits limits = simt::limits();
    Result result{};
    const bool found = (tier == Tier::any || tier == Tier::registers) &&
                       (try_registers<RegisterMatrices>(p, limits, use, result) || ...);
    if (found) return result;
    if (tier != Tier::stream) {
      const InSharedWay way(p, limits);
      if (tier != Tier::any || way.choice.tier == Tier::shared) return use(way);
    }
    return use(InStreamWay(p, limits));
  }
  template <class M, class Use, class Result>
  static bool try_registers(const Problems& p, const simt::Limits& limits, Use use, Result& result) {
    if (p.n > M::max_rows || p.m > M::max_cols) return false;
    result = use(InRegistersWay<Algorithm<M>>(p, limits));
    return true;
  }
};

}  // namespace otface::sinkhorn
