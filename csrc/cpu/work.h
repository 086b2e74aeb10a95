// Several pieces of work done together: all of them are prepared, then all are done, so that threads wait for one
// another twice however many pieces there are.
#pragma once
#include "kernel.h"

#include <memory>
#include <vector>

namespace torch_curvature::cpu {

// What a thread keeps from task to task of one piece of work.
struct Worker {
  virtual ~Worker() = default;
  virtual void run(int64_t task) = 0;
  virtual void finish() {}  // after its last task
};

// One piece: preparations in any order and, when all are made, tasks in any order. Who does what must not matter.
struct Work {
  virtual ~Work() = default;
  virtual double cost() const = 0;  // multiply-adds
  virtual int64_t preparations() const { return 0; }
  virtual void prepare(int64_t) {}
  virtual int64_t tasks() const = 0;
  virtual std::unique_ptr<Worker> worker() = 0;
  virtual bool next() { return false; }  // on to another round of both, where there is one
};

// The k-th of some tasks of several pieces, those of one piece after the other.
struct TaskRange {
  std::vector<int64_t> ends;
  void add(int64_t count) { ends.push_back((ends.empty() ? 0 : ends.back()) + count); }
  int64_t count() const { return ends.empty() ? 0 : ends.back(); }
  size_t piece(int64_t task) const { return std::upper_bound(ends.begin(), ends.end(), task) - ends.begin(); }
  int64_t within(size_t piece, int64_t task) const { return task - (piece ? ends[piece - 1] : 0); }
};

inline void do_tasks(const std::vector<Work*>& all, const TaskRange& range, std::atomic<int64_t>& next) {
  std::unique_ptr<Worker> worker;
  size_t of = all.size();
  for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < range.count();) {
    const size_t piece = range.piece(task);
    if (piece != of) {
      if (worker) worker->finish();
      worker.reset();
      worker = all[of = piece]->worker();
    }
    worker->run(range.within(piece, task));
  }
  if (worker) worker->finish();
}

// The largest pieces first: what the threads end with is small.
inline void do_together(std::vector<Work*> all) {
  std::stable_sort(all.begin(), all.end(), [](const Work* x, const Work* y) { return x->cost() > y->cost(); });
  while (!all.empty()) {
    double cost = 0;
    TaskRange preparations, tasks;
    for (Work* work : all) {
      cost += work->cost();
      preparations.add(work->preparations());
      tasks.add(work->tasks());
    }
    share_tasks(preparations.count(), cost > kWorthThreads, [&](int64_t task) {
      const size_t piece = preparations.piece(task);
      all[piece]->prepare(preparations.within(piece, task));
    });
    std::atomic<int64_t> next{0};
    const int64_t threads =
        cost > kWorthThreads ? std::min<int64_t>(tasks.count(), torch::stable::get_num_threads()) : 1;
    if (threads <= 1) do_tasks(all, tasks, next);
    else torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { do_tasks(all, tasks, next); });
    std::erase_if(all, [](Work* work) { return !work->next(); });
  }
}
}  // namespace torch_curvature::cpu
