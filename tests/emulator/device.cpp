// What device.h declares and no kernel's types change: compiled once for all of them, and with all optimization, since
// most of a run's time goes by here and in tensor_cores.cpp.
#include "device.h"

namespace emulator {

void fail(const std::string& what) {
  std::fflush(stdout);
  std::fprintf(stderr, "%s\n  in the call: %s\n", what.c_str(), current_call.c_str());
  std::exit(1);
}

bool chance(int percent) { return static_cast<int>(random_engine() % 100) < percent; }

double dot(const float* x, const float* y, int count) {
  double sums[8] = {};  // a single one would wait for itself in each step
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += double{x[i + lane]} * double{y[i + lane]};
  }
  for (; i < count; ++i) sums[0] += double{x[i]} * double{y[i]};
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

void add_scaled(double* sums, double factor, const float* x, int count) {
  for (int i = 0; i < count; ++i) sums[i] += factor * x[i];
}

// ---------------------------------------------------------------------------------------------
// Threads

namespace {

void run_fibre_body() {
  cta.body();
  this_fibre().done = true;
  _longjmp(cta.scheduler, 1);
}

void run_fibre(int thread_idx) {
  cta.thread_idx = thread_idx;
  Fibre& fibre = this_fibre();
  if (_setjmp(cta.scheduler) != 0) return;
  if (fibre.begun) _longjmp(fibre.place, 1);
  fibre.begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre.stack.get();
  context.uc_stack.ss_size = Fibre::kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fibre_body, 0);
  setcontext(&context);
}

void complete_pending(size_t idx) {
  const std::function<void()> work = std::move(cta.pending[idx]);
  cta.pending.erase(cta.pending.begin() + static_cast<int64_t>(idx));
  work();
}

[[noreturn]] void fail_with_deadlock() {
  std::string what =
      "deadlock in CTA " + std::to_string(cta.block_idx) + "; what is waited for, by the lanes from each named on:";
  for (size_t warp = 0; warp < cta.warps.size(); ++warp) {
    std::string before;
    for (int lane = 0; lane < 32; ++lane) {
      const Fibre& fibre = cta.fibres[warp * 32 + lane];
      const std::string text = fibre.done ? "" : fibre.waits_for->text();
      if (text != before) {
        what += "\n    warp " + std::to_string(warp) + ", lane " + std::to_string(lane) +
                (text.empty() ? " has ended" : " for " + text);
      }
      before = text;
    }
  }
  fail(what);
}

bool is_ready(int warp) {
  const auto begin = cta.fibres.begin() + warp * 32;
  return std::any_of(begin, begin + 32, [](const Fibre& f) { return f.may_run(); });
}

// Each lane until it waits; false if all do already.
bool run_warp(int warp) {
  cta.warps[warp].steps_aside = false;
  bool any = false;
  for (int thread = warp * 32; thread < warp * 32 + 32; ++thread) {
    if (!cta.fibres[thread].may_run()) continue;
    any = true;
    run_fibre(thread);
  }
  return any;
}

void run_cluster(int threads_of_cta, int cluster_size, std::function<void()> body) {
  const int num_threads = threads_of_cta * cluster_size;
  cta.num_threads = threads_of_cta;
  cta.cluster_size = cluster_size;
  cta.body = std::move(body);
  cta.num_polls = 0;
  if (static_cast<int>(cta.fibres.size()) < num_threads) cta.fibres.resize(num_threads);
  for (int i = 0; i < num_threads; ++i) {
    cta.fibres[i].begun = cta.fibres[i].done = cta.fibres[i].at_cluster = false;
    cta.fibres[i].waits_for = nullptr;
  }
  cta.warps.assign(num_threads / 32, Warp());
  for (auto& barriers : cta.barriers) std::fill_n(barriers, 16, NamedBarrier());
  cta.cluster_barrier = NamedBarrier();

  constexpr int kSpeeds[] = {5, 30, 100};  // percent
  const int copy_speed = kSpeeds[random_engine() % 3];
  std::vector<int> order(cta.warps.size()), speed(cta.warps.size());
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = static_cast<int>(i);
    speed[i] = kSpeeds[random_engine() % 3];
  }
  const auto all_done = [&] {
    return std::all_of(cta.fibres.begin(), cta.fibres.begin() + num_threads, [](const Fibre& f) { return f.done; });
  };
  while (!all_done()) {
    std::shuffle(order.begin(), order.end(), random_engine);
    bool any_ready = false;
    for (int warp : order) {
      if (!cta.pending.empty() && chance(copy_speed)) {
        complete_pending(random_engine() % cta.pending.size());
        any_ready = true;
      }
      if (chance(speed[warp])) {
        while (run_warp(warp)) {
          any_ready = true;
          if (cta.warps[warp].steps_aside) break;
        }
      } else {
        any_ready = any_ready || is_ready(warp);
      }
    }
    if (any_ready) continue;
    if (cta.pending.empty()) fail_with_deadlock();
    complete_pending(random_engine() % cta.pending.size());
  }
  if (!cta.pending.empty()) fail("a CTA ended before its copies did");
  for (const auto& check : end_of_cta) check();
}

}  // namespace

void require_running(int rank) {
  const auto begin = cta.fibres.begin() + rank * cta.num_threads;
  if (std::all_of(begin, begin + cta.num_threads, [](const Fibre& f) { return f.done; })) {
    fail("shared memory of a CTA that has ended is used by another");
  }
}

void run_grid(int64_t num_ctas, int cluster_size, int num_threads, int num_smem_bytes, std::function<void()> body) {
  if (num_smem_bytes > kMaxSmemBytes) fail("too much shared memory");
  if (cluster_size > kMaxCtas) fail("more CTAs together than there is memory for");
  if (num_ctas % cluster_size != 0) fail("a cluster that is not whole");
  cta.num_blocks = num_ctas;
  for (cta.block_idx = 0; cta.block_idx < num_ctas; cta.block_idx += cluster_size) {
    std::memset(smem_bytes, 0xff, cluster_size * kMaxSmemBytes);
    const bool is_last = cta.block_idx + cluster_size == num_ctas;
    cta.num_tickets = is_last ? INT32_MAX : static_cast<int>(random_engine() % 6);
    run_cluster(num_threads, cluster_size, body);
    for (int rank = 0; rank < cluster_size; ++rank) {
      for (int warp = 0; warp < 32; ++warp) {
        int (&waits)[32] = num_product_waits[rank];
        if (waits[warp] != waits[warp / 4 * 4]) fail("warps of a group wait for products at different places");
        if (warp % 4 == 3) std::fill(waits + warp - 3, waits + warp + 1, 0);
      }
      // All are 0xff if the first is, and each is what the next one is.
      const unsigned char* const behind = smem_of(rank) + num_smem_bytes;
      const size_t num_behind = kMaxSmemBytes - num_smem_bytes;
      if (num_behind > 0 && (behind[0] != 0xff || std::memcmp(behind, behind + 1, num_behind - 1) != 0)) {
        fail("a write behind the end of shared memory");
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Barriers

std::string LanesMeet::text() const {
  return "the other lanes, of which " + std::to_string(warp.num_arrived) + " came";
}

namespace {

struct BarrierOpens final : Condition {
  const NamedBarrier& barrier;
  int idx;  // -1: the cluster's
  BarrierOpens(const NamedBarrier& b, int i, uint64_t phase) : Condition(b.num_phases, phase), barrier(b), idx(i) {}
  std::string text() const override {
    return (idx < 0 ? "the cluster's barrier" : "named barrier " + std::to_string(idx)) + ", where " +
           std::to_string(barrier.num_arrived) + " threads came";
  }
};

// The last of num_threads opens a barrier.
void arrive_at_barrier(NamedBarrier& b, int num_threads, bool vote = false) {
  b.num_votes += vote;
  if (++b.num_arrived < num_threads) return;
  b.any_vote = b.num_votes > 0;
  b.num_arrived = b.num_votes = 0;
  ++b.num_phases;
}

}  // namespace

void arrive_at_barrier(int barrier, int num_threads) {
  arrive_at_barrier(cta.barriers[this_rank()][barrier], num_threads);
}

bool sync_at_barrier(int barrier, int num_threads, bool vote) {
  NamedBarrier& b = cta.barriers[this_rank()][barrier];
  const BarrierOpens opens(b, barrier, b.num_phases);
  arrive_at_barrier(b, num_threads, vote);
  wait(opens);
  return b.any_vote;
}

void sync_cluster() {
  arrive_at_cluster();
  wait_for_cluster();
}

void arrive_at_cluster() {
  Fibre& fibre = this_fibre();
  if (fibre.at_cluster) fail("a thread arrives at the cluster's barrier twice before it waits there");
  fibre.at_cluster = true;
  fibre.cluster_phase = cta.cluster_barrier.num_phases;
  arrive_at_barrier(cta.cluster_barrier, cta.num_threads * cta.cluster_size);
  maybe_step_aside();
}

void wait_for_cluster() {
  Fibre& fibre = this_fibre();
  if (!fibre.at_cluster) fail("a thread waits at the cluster's barrier, where it has not arrived");
  fibre.at_cluster = false;
  wait(BarrierOpens(cta.cluster_barrier, -1, fibre.cluster_phase));
}

void poll(int most) {
  if (++cta.num_polls > most) fail("a thread polls forever in CTA " + std::to_string(cta.block_idx));
  this_warp().steps_aside = true;  // who is waited for may be of the same CTA
  to_scheduler();
}

}  // namespace emulator
