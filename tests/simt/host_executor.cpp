// Runs a kernel on the CPU: one fiber per CUDA thread, on one OS thread.
//
// Order: warps advance in rounds. In a round each of the warp's lanes runs, in random order, until it waits or exits.
// Then the warp's collective is done, or its barrier noted, and a random warp goes on, by preference the same one, so
// that warps run far ahead of one another where no barrier holds them. Blocks of an ordinary launch run one after
// another in random order, those of a cooperative launch all at once. Everything follows from the seed.
//
// A warp whose lanes do not all wait at the same line, a barrier that not all threads of the block reach and a gang
// that can never fill end the launch with a report. Shared memory is a heap block of exactly its size, filled with NaN.
//
// Sanitizers: the address sanitizer is told of each switch. For the thread sanitizer each lane is a thread of its own,
// and a switch implies no order: only what a barrier orders on a GPU is ordered. Even and odd barriers have tags of
// their own, because a lane may release the next barrier while another still has to acquire this one. Blocks are not
// ordered either, but since a lane is too dear to make for each block, there are two sets of lanes, used in turn: of
// three blocks that run one after another, two are seen as ordered. This file itself must not be instrumented by the
// thread sanitizer: compile it without, and with SIMT_THREAD_SANITIZER defined. For the same reason its containers only
// hold types that no other file has.

#include <sys/mman.h>

#include <algorithm>
#include <cfenv>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/simt.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(SIMT_THREAD_SANITIZER)
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace otface::simt::executor {

Settings settings;
const Place* here = nullptr;

namespace {

constexpr size_t stack_bytes = 256 << 10;
constexpr int warp_lanes = 32;

// --- Memory whose history the thread sanitizer forgets

struct QuietMemory {
  explicit QuietMemory(size_t bytes) {
    quietly([&] { p = static_cast<char*>(std::malloc(bytes)); });
  }
  ~QuietMemory() {
    quietly([&] { std::free(p); });
  }
  QuietMemory(const QuietMemory&) = delete;
  void operator=(const QuietMemory&) = delete;

  char* p;

 private:
  template <class F>
  static void quietly(F f) {
#if defined(SIMT_THREAD_SANITIZER)
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    f();
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#else
    f();
#endif
  }
};

// What one barrier orders: even and odd passes. On the heap, since the thread sanitizer forgets a tag when it is freed.
struct Order {
  struct Tags {
    char tag[2];
  };
  std::unique_ptr<Tags> tags = std::make_unique<Tags>();
  unsigned passes = 0;  // counted when the barrier opens

  char* tag() { return &tags->tag[passes & 1]; }
};

void release(char* tag) {
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_release(tag);
#else
  (void)tag;
#endif
}
void acquire(char* tag) {
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_acquire(tag);
#else
  (void)tag;
#endif
}

// --- Fibers

#if defined(__x86_64__)
// Keeps the registers that a call must keep on the old stack, and takes them from the new one.
extern "C" void otface_simt_switch(void** old_stack, void* new_stack);
asm(R"(
.text
.type otface_simt_switch, @function
otface_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size otface_simt_switch, .-otface_simt_switch
)");
struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + stack_bytes);
    *--top = nullptr;  // where entry would return to; also aligns the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) { otface_simt_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void prepare(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

struct Fiber {
  Context context;
  const void* stack = nullptr;  // the lowest byte
  size_t stack_size = 0;
  void* sanitizer = nullptr;  // its own handle of this fiber
};

Fiber host;  // who called launch
Fiber* running = &host;

void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  const void* from = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(running->sanitizer, &from, &size);
  if (host.stack == nullptr) {  // the first switch came from there
    host.stack = from;
    host.stack_size = size;
  }
#endif
}

void change(Fiber& to) {
  Fiber& from = *std::exchange(running, &to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.stack_size);
#elif defined(SIMT_THREAD_SANITIZER)
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  Context::change(from.context, to.context);
  arrived();
}

// --- Lanes, warps, blocks

struct Block;
struct Warp;

struct Lane : Fiber {
  Place place;
  Warp* warp;
  Wait wait;
  Where where;
  uint64_t value, result;  // of a collective
  int source_lane;
  int set;
};

struct Warp {
  Block* block;
  int index;
  std::unique_ptr<Lane> lanes[warp_lanes];
  int count = 0;
  Order order;  // of sync_warp
  enum State { ready, waiting, exited } state = ready;
  int ready_index = -1;
};

struct Block {
  explicit Block(size_t shared_bytes) : shared(shared_bytes) {}

  int64_t index;
  QuietMemory shared;
  std::vector<std::unique_ptr<Warp>> warps;
  int waiting = 0, exited = 0;  // warps
  bool any = false, any_result = false;
  Order order;  // of sync_block and any_in_block
  unsigned* counter;
  unsigned gang_blocks;
};

struct Gang {
  unsigned blocks;
  unsigned counter_value = 0;
  std::vector<Block*> arrived;
  Order order;
};

// --- The launch that runs

struct Random {
  uint64_t state;

  uint64_t operator()() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  uint64_t below(uint64_t n) { return static_cast<uint64_t>((static_cast<unsigned __int128>((*this)()) * n) >> 64); }
};

struct Launch {
  LaunchShape shape;
  void (*body)(void*);
  void* context;
  Random random;
  uint64_t stay;  // of 16 times, how often the same warp goes on
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Warp*> ready;
  std::map<unsigned*, Gang> gangs;
  // The round
  Warp* warp = nullptr;
  Lane* round[warp_lanes];
  int round_size = 0, next = 0;
};
Launch* current = nullptr;

Lane& self() { return *static_cast<Lane*>(running); }

std::vector<std::unique_ptr<Lane>> idle_lanes[2];  // their sets
char start_tag;                                    // orders what the host does before the launch before all lanes
char end_tag;                                      // orders all lanes before what the host does after the launch
char report[4096] = "";
bool failed = false;

// --- Reports

struct Text {
  char* end = report;

  __attribute__((format(printf, 2, 3))) Text& add(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const size_t room = static_cast<size_t>(report + sizeof(report) - end);
    const int length = std::vsnprintf(end, room, format, arguments);
    va_end(arguments);
    end += length < static_cast<int>(room) ? length : static_cast<int>(room) - 1;
    return *this;
  }
};

const char* name(Wait wait) {
  switch (wait) {
    case Wait::none: return "nothing";
    case Wait::shuffle: return "a shuffle";
    case Wait::vote: return "a vote";
    case Wait::sync_warp: return "sync_warp";
    case Wait::sync_block: return "sync_block";
    case Wait::any_in_block: return "any_in_block";
    case Wait::gang_barrier: return "gang_barrier";
    case Wait::exited: return "its end";
  }
  return "";
}

bool together(const Lane& a, const Lane& b) {
  return a.wait == b.wait &&
         (a.wait == Wait::exited || (a.where.line() == b.where.line() && a.where.column() == b.where.column() &&
                                     std::strcmp(a.where.file_name(), b.where.file_name()) == 0));
}

void add_place(Text& text, const Lane& lane) {
  if (lane.wait == Wait::exited) {
    text.add("exited");
  } else {
    text.add("at %s, %s:%u", name(lane.wait), lane.where.file_name(), static_cast<unsigned>(lane.where.line()));
  }
}

// The lanes of a warp, by where they are.
void add_lanes(Text& text, const Warp& warp) {
  unsigned told = 0;
  for (int k = 0; k < warp.count; ++k) {
    if (told >> k & 1) continue;
    unsigned mask = 0;
    for (int other = k; other < warp.count; ++other) {
      if (together(*warp.lanes[k], *warp.lanes[other])) mask |= 1u << other;
    }
    told |= mask;
    text.add("\n  block %lld, warp %d, lanes 0x%08x: ", static_cast<long long>(warp.block->index), warp.index, mask);
    add_place(text, *warp.lanes[k]);
  }
}

// Ends the launch. Its lanes stay where they are and are never resumed.
[[noreturn]] void fail() {
#if defined(__SANITIZE_ADDRESS__) || defined(SIMT_THREAD_SANITIZER)
  if (running != &host) __sanitizer_print_stack_trace();  // who called the function that waits
#endif
  failed = true;
  here = nullptr;
  change(host);
  std::abort();
}

// --- The scheduler: runs on the fiber of the lane that waited last

void make_ready(Warp& warp) {
  warp.state = Warp::ready;
  for (int k = 0; k < warp.count; ++k) warp.lanes[k]->wait = Wait::none;
  warp.ready_index = static_cast<int>(current->ready.size());
  current->ready.push_back(&warp);
}

void take_from_ready(Warp& warp, Warp::State state) {
  warp.state = state;
  current->ready[warp.ready_index] = current->ready.back();
  current->ready[warp.ready_index]->ready_index = warp.ready_index;
  current->ready.pop_back();
}

void open_barrier(Block& block) {
  ++block.order.passes;
  block.any_result = std::exchange(block.any, false);
  block.waiting = 0;
  for (auto& warp : block.warps) make_ready(*warp);
}

void arrive_at_gang(Block& block, const Lane& lane) {
  if (!current->shape.cooperative) {
    Text().add("simt: gang_barrier in a launch that is not cooperative, %s:%u", lane.where.file_name(),
               static_cast<unsigned>(lane.where.line()));
    fail();
  }
  Gang& gang = current->gangs[block.counter];
  if (gang.blocks != block.gang_blocks || gang.counter_value != *block.counter) {
    Text text;
    if (gang.blocks != block.gang_blocks) {
      text.add("simt: gang_barrier with %u blocks on a counter of %u", block.gang_blocks, gang.blocks);
    } else {
      text.add("simt: the counter of a gang_barrier is %u instead of %u", *block.counter, gang.counter_value);
    }
    text.add("\n  block %lld: ", static_cast<long long>(block.index));
    add_place(text, lane);
    fail();
  }
  gang.arrived.push_back(&block);
  *block.counter = ++gang.counter_value;
  if (gang.arrived.size() < gang.blocks) return;
  *block.counter = gang.counter_value += std::bit_ceil(2 * gang.blocks) - gang.blocks;  // as on the GPU
  ++gang.order.passes;
  for (Block* member : gang.arrived) open_barrier(*member);
  gang.arrived.clear();
}

// All warps of the block wait or have exited.
void settle(Block& block) {
  if (block.waiting == 0) return;
  const Lane& lane = *block.warps[0]->lanes[0];
  bool same = true;
  for (auto& warp : block.warps) same = same && together(lane, *warp->lanes[0]);
  if (!same) {
    Text text;
    text.add("simt: a barrier that not all threads of the block reach");
    for (auto& warp : block.warps) add_lanes(text, *warp);
    fail();
  }
  if (lane.wait == Wait::gang_barrier) {
    arrive_at_gang(block, lane);
  } else {
    open_barrier(block);
  }
}

// Every lane of the warp waits or has exited.
void settle(Warp& warp) {
  const Lane& lane = *warp.lanes[0];
  bool same = true;
  for (int k = 1; k < warp.count; ++k) same = same && together(lane, *warp.lanes[k]);
  const bool collective = lane.wait == Wait::shuffle || lane.wait == Wait::vote || lane.wait == Wait::sync_warp;
  if (!same || (collective && warp.count != warp_lanes)) {
    Text text;
    text.add(same ? "simt: a collective in a warp of fewer than 32 lanes" : "simt: lanes of a warp part");
    add_lanes(text, warp);
    fail();
  }
  Block& block = *warp.block;
  switch (lane.wait) {
    case Wait::shuffle:
      for (auto& each : warp.lanes) each->result = warp.lanes[each->source_lane]->value;
      break;
    case Wait::vote: {
      uint64_t votes = 0;
      for (int k = 0; k < warp_lanes; ++k) votes |= warp.lanes[k]->value << k;
      for (auto& each : warp.lanes) each->result = votes;
      break;
    }
    case Wait::sync_warp: ++warp.order.passes; break;
    case Wait::exited:
      take_from_ready(warp, Warp::exited);
      ++block.exited;
      break;
    default:
      take_from_ready(warp, Warp::waiting);
      ++block.waiting;
      break;
  }
  if (collective) {
    for (auto& each : warp.lanes) each->wait = Wait::none;
  } else if (block.waiting + block.exited == static_cast<int>(block.warps.size())) {
    settle(block);
  }
}

[[noreturn]] void fail_with_deadlock() {
  Text text;
  text.add("simt: deadlock");
  for (auto& [counter, gang] : current->gangs) {
    if (gang.arrived.empty()) continue;
    text.add("\n  gang_barrier of %u blocks, reached by %zu; ", gang.blocks, gang.arrived.size());
    add_place(text, *gang.arrived[0]->warps[0]->lanes[0]);
  }
  for (auto& block : current->blocks) add_lanes(text, *block->warps[0]);
  fail();
}

Fiber* next_fiber() {
  Launch& launch = *current;
  if (launch.next == launch.round_size) {
    if (launch.warp != nullptr) settle(*launch.warp);
    const uint64_t random = launch.random();
    if (launch.warp == nullptr || launch.warp->state != Warp::ready || (random & 15) >= launch.stay) {
      if (launch.ready.empty()) {
        for (auto& block : launch.blocks) {
          if (block->waiting != 0) fail_with_deadlock();
        }
        launch.warp = nullptr;
        launch.round_size = launch.next = 0;
        return &host;
      }
      launch.warp = launch.ready[launch.random.below(launch.ready.size())];
    }
    const Warp& warp = *launch.warp;
    const uint64_t factor = (random >> 4) | 1, first = random >> 16, flip = random >> 32;
    launch.round_size = launch.next = 0;
    for (uint64_t k = 0; k < warp_lanes; ++k) {
      const int lane = static_cast<int>(((factor * k + first) ^ flip) % warp_lanes);
      if (lane < warp.count) launch.round[launch.round_size++] = warp.lanes[lane].get();
    }
  }
  return launch.round[launch.next++];
}

void go_on() {
  Fiber* next = next_fiber();
  here = next == &host ? nullptr : &static_cast<Lane*>(next)->place;
  if (next != running) change(*next);
}

void wait(Wait what, Where where) {
  Lane& lane = self();
  lane.wait = what;
  lane.where = where;
  go_on();
}

void run_lane() {
  arrived();
  for (;;) {  // a lane is used again for other blocks
    acquire(&start_tag);
    current->body(current->context);
    release(&end_tag);
    wait(Wait::exited, Where());
  }
}

// --- Barriers by their place in the source

struct Barrier {
  const char* file;
  unsigned line;
  auto operator<=>(const Barrier&) const = default;
};
struct BarrierState {
  std::string name;
  bool stands;
};
std::map<Barrier, BarrierState> barriers_reached;

// False where the barrier is to be left out.
bool stands(Where where) {
  const Barrier barrier{where.file_name(), static_cast<unsigned>(where.line())};
  const auto [entry, is_new] = barriers_reached.try_emplace(barrier);
  BarrierState& state = entry->second;
  if (is_new) {
    const char* slash = std::strrchr(barrier.file, '/');
    state.name = std::string(slash == nullptr ? barrier.file : slash + 1) + ":" + std::to_string(barrier.line);
    state.stands = state.name != settings.without_barrier;
  }
  return state.stands;
}

// --- Setting up and clearing away, on the host's fiber

void start_afresh(Lane& lane) {
  char* stack = static_cast<char*>(const_cast<void*>(lane.stack));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, stack_bytes);
  lane.sanitizer = nullptr;
#elif defined(SIMT_THREAD_SANITIZER)
  if (lane.sanitizer != nullptr) {
    __tsan_switch_to_fiber(lane.sanitizer, __tsan_switch_to_fiber_no_sync);
    release(&end_tag);  // for the lane, which never will
    __tsan_switch_to_fiber(host.sanitizer, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(lane.sanitizer);
  }

  lane.sanitizer = __tsan_create_fiber(0);
#endif
  lane.context.prepare(stack, run_lane);
}

std::unique_ptr<Lane> take_lane(int set) {
  std::unique_ptr<Lane> lane;
  if (idle_lanes[set].empty()) {
    lane = std::make_unique<Lane>();
    lane->set = set;
    constexpr size_t guard = 64 << 10;  // an overflow of the stack is a fault
    void* memory = mmap(nullptr, guard + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) std::abort();
    lane->stack = static_cast<char*>(memory) + guard;
    lane->stack_size = stack_bytes;
    start_afresh(*lane);
  } else {
    lane = std::move(idle_lanes[set].back());
    idle_lanes[set].pop_back();
  }
  return lane;
}

void give_back_lane(std::unique_ptr<Lane> lane) {
  if (failed) start_afresh(*lane);  // it is somewhere in the kernel
  const int set = lane->set;
  idle_lanes[set].push_back(std::move(lane));
}

void add_block(int64_t index, int set) {
  const LaunchShape& shape = current->shape;
  auto block = std::make_unique<Block>(shape.shared_bytes);
  block->index = index;
  poison(block->shared.p, shape.shared_bytes);
  for (int t = 0; t < shape.threads; ++t) {
    if (t % warp_lanes == 0) {
      block->warps.push_back(std::make_unique<Warp>());
      block->warps.back()->block = block.get();
      block->warps.back()->index = t / warp_lanes;
    }
    Warp& warp = *block->warps.back();
    std::unique_ptr<Lane> lane = take_lane(set);
    lane->place = {t, shape.threads, index, shape.blocks, block->shared.p};
#if defined(SIMT_THREAD_SANITIZER)
    char name[64];
    std::snprintf(name, sizeof(name), "block %lld, thread %d", static_cast<long long>(index), t);
    __tsan_set_fiber_name(lane->sanitizer, name);
#endif

    lane->warp = &warp;
    warp.lanes[warp.count++] = std::move(lane);
  }
  for (auto& warp : block->warps) make_ready(*warp);
  current->blocks.push_back(std::move(block));
}

void run_blocks() {
  const int exceptions = settings.trap_invalid ? feenableexcept(FE_INVALID) : 0;
  go_on();
  if (settings.trap_invalid) {
    feclearexcept(FE_INVALID);
    if ((exceptions & FE_INVALID) == 0) fedisableexcept(FE_INVALID);
  }
  for (auto& block : current->blocks) {
    for (auto& warp : block->warps) {
      for (int k = 0; k < warp->count; ++k) give_back_lane(std::move(warp->lanes[k]));
    }
  }
  current->blocks.clear();
}

const char* shape_error(const LaunchShape& shape) {
  if (shape.threads < 1 || shape.threads > 1024) return "threads of a block";
  if (shape.blocks < 0 || shape.blocks > INT32_MAX) return "blocks";
  if (shape.shared_bytes > static_cast<size_t>(settings.limits.shared_bytes_per_block)) return "shared memory";
  if (shape.cooperative && shape.blocks > resident_blocks(shape)) return "blocks of a cooperative launch";
  return nullptr;
}

}  // namespace

void poison(void* p, size_t bytes) {
  const uint32_t any_type[2] = {0x7fa5a5a5u, 0x7ff4a5a5u}, float_type[2] = {0x7fa5a5a5u, 0x7fa5a5a5u};
  const char* pattern = reinterpret_cast<const char*>(settings.poison == Poison::any_type ? any_type : float_type);
  for (size_t k = 0; k < bytes; ++k) static_cast<char*>(p)[k] = pattern[k % 8];
}

// --- What kernels call

uint64_t shuffle(uint64_t bits, int source_lane, Where where) {
  Lane& lane = self();
  if (source_lane < 0 || source_lane >= warp_lanes) {
    Text().add("simt: shuffle from lane %d, %s:%u", source_lane, where.file_name(),
               static_cast<unsigned>(where.line()));
    fail();
  }
  lane.value = bits;
  lane.source_lane = source_lane;
  wait(Wait::shuffle, where);
  return lane.result;
}

unsigned vote(bool x, Where where) {
  Lane& lane = self();
  lane.value = x;
  wait(Wait::vote, where);
  return static_cast<unsigned>(lane.result);
}

void sync_warp(Where where) {
  if (!stands(where)) return;
  char* tag = self().warp->order.tag();
  release(tag);
  wait(Wait::sync_warp, where);
  acquire(tag);
}

void sync_block(Where where) {
  if (!stands(where)) return;
  char* tag = self().warp->block->order.tag();
  release(tag);
  wait(Wait::sync_block, where);
  acquire(tag);
}

bool any_in_block(bool x, Where where) {
  const bool orders = stands(where);  // if left out, it still votes
  Block& block = *self().warp->block;
  block.any = block.any || x;
  char* tag = block.order.tag();
  if (orders) release(tag);
  wait(Wait::any_in_block, where);
  if (orders) acquire(tag);
  return block.any_result;
}

void gang_barrier(unsigned* counter, unsigned blocks, Where where) {
  if (!stands(where)) return;

  Block& block = *self().warp->block;
  block.counter = counter;
  block.gang_blocks = blocks;
  const auto [entry, is_new] = current->gangs.try_emplace(counter);
  Gang& gang = entry->second;
  if (is_new) {
    gang.blocks = blocks;
    gang.arrived.reserve(current->blocks.size());  // so that no lane frees what another allocated
  }
  char* tag = gang.order.tag();
  release(tag);
  wait(Wait::gang_barrier, where);
  acquire(tag);
}

void check_alignment(const void* p, Where where) {
  if (reinterpret_cast<uintptr_t>(p) % 16 == 0) return;
  Text().add("simt: a pack at an address that is not 16-byte aligned, %s:%u", where.file_name(),
             static_cast<unsigned>(where.line()));
  fail();
}

// --- What launchers and tests call

std::vector<std::string> barriers() {
  std::vector<std::string> names;
  for (const auto& [barrier, state] : barriers_reached) {
    if (std::find(names.begin(), names.end(), state.name) == names.end()) names.push_back(state.name);
  }
  return names;
}

int64_t resident_blocks(const LaunchShape& shape) {
  const int64_t per_threads = settings.threads_per_multiprocessor / std::max(1, shape.threads);
  const int64_t shared = static_cast<int64_t>(shape.shared_bytes) + 1024;  // 1 KB is CUDA's own
  const int64_t per_shared = settings.limits.shared_bytes_per_multiprocessor / shared;
  const int64_t blocks = std::min({per_threads, per_shared, static_cast<int64_t>(settings.blocks_per_multiprocessor)});
  return blocks * settings.limits.multiprocessors;
}

const char* run(const LaunchShape& shape, void (*body)(void*), void* context) {
  if (const char* what = shape_error(shape)) {
    Text().add("simt: %s: out of range (%lld blocks of %d threads, %zu bytes of shared memory each)", what,
               static_cast<long long>(shape.blocks), shape.threads, shape.shared_bytes);
    return report;
  }
  Launch launch{};
  launch.shape = shape;
  launch.body = body;
  launch.context = context;
  launch.random.state = settings.seed;
  const uint64_t stay[] = {0, 8, 15, 16};
  launch.stay = stay[launch.random.below(4)];
  current = &launch;
  failed = false;
  report[0] = 0;
#if defined(SIMT_THREAD_SANITIZER)
  host.sanitizer = __tsan_get_current_fiber();
#endif
  release(&start_tag);
  for (auto& [barrier, state] : barriers_reached) state.stands = state.name != settings.without_barrier;
  const auto order = std::make_unique<int64_t[]>(static_cast<size_t>(shape.blocks));
  for (int64_t k = 0; k < shape.blocks; ++k) {  // a random permutation, growing
    const int64_t place = static_cast<int64_t>(launch.random.below(static_cast<uint64_t>(k) + 1));
    order[k] = order[place];
    order[place] = k;
  }
  for (int64_t k = 0; k < shape.blocks && !failed; ++k) {
    add_block(order[k], shape.cooperative ? 0 : static_cast<int>(k % 2));
    if (!shape.cooperative || k == shape.blocks - 1) run_blocks();
  }
  acquire(&end_tag);
  current = nullptr;
  return report;
}

}  // namespace otface::simt::executor
