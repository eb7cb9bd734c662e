#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>

namespace fastrlhf {
namespace {

// More chunks than threads, so that rows of uneven work (masked ones cost nothing) level out.
constexpr int64_t CHUNKS_PER_THREAD = 4;
constexpr int MAX_THREADS = 1024;

struct Job {  // lives on its caller's stack; everything below is guarded by Pool::mutex
  RangeFn fn;
  void* context;
  int64_t n;
  int64_t chunks;
  int helpers_wanted;
  int64_t taken = 0;
  int64_t finished = 0;
  Job* next = nullptr;

  void run(int64_t chunk) const {  // the first n % chunks chunks are one item longer
    const int64_t size = n / chunks, extra = n % chunks;
    const int64_t begin = chunk * size + std::min(chunk, extra);
    fn(context, begin, begin + size + (chunk < extra ? 1 : 0));
  }
};

class Pool {
 public:
  void run(Job& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    grow(job.helpers_wanted);
    job.next = jobs_;
    jobs_ = &job;
    for (int i = 0; i < job.helpers_wanted; ++i) work_.notify_one();
    work_on(job, lock);
    done_.wait(lock, [&] { return job.finished == job.chunks; });
  }

  int threads() {
    std::lock_guard<std::mutex> lock(mutex_);
    return threads_;
  }

 private:
  // Takes chunks until none is left. When it returns the job may already be gone.
  void work_on(Job& job, std::unique_lock<std::mutex>& lock) {
    bool left = job.taken < job.chunks;
    while (left) {
      const int64_t chunk = job.taken++;
      if (job.taken == job.chunks) unlink(job);
      lock.unlock();
      job.run(chunk);
      lock.lock();
      left = job.taken < job.chunks;
      if (++job.finished == job.chunks) done_.notify_all();
    }
  }

  void unlink(Job& job) {
    Job** at = &jobs_;
    while (*at != &job) at = &(*at)->next;
    *at = job.next;
  }

  Job* wanting() {
    for (Job* job = jobs_; job != nullptr; job = job->next) {
      if (job->helpers_wanted > 0) return job;
    }
    return nullptr;
  }

  // A thread that cannot be had is done without: the caller takes the chunks that nobody takes.
  void grow(int wanted) {
    while (threads_ < wanted) {
      sigset_t all, before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);  // signals belong to the threads that run Python
      pthread_t thread;
      const int error = pthread_create(&thread, nullptr, &Pool::enter, this);
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      if (error != 0) return;
      pthread_detach(thread);
      ++threads_;
    }
  }

  static void* enter(void* pool) {
    static_cast<Pool*>(pool)->loop();
    return nullptr;
  }

  [[noreturn]] void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      work_.wait(lock, [&] { return (job = wanting()) != nullptr; });
      --job->helpers_wanted;
      work_on(*job, lock);
    }
  }

  std::mutex mutex_;
  std::condition_variable work_, done_;
  Job* jobs_ = nullptr;
  int threads_ = 0;
};

// In static storage and never destroyed: detached threads may sleep in it until the process ends.
alignas(Pool) unsigned char storage[sizeof(Pool)];

void make_pool() { new (static_cast<void*>(storage)) Pool; }

Pool& pool() {
  // A child of fork has none of the threads and perhaps a locked mutex: it builds the pool anew.
  static const bool made = (make_pool(), pthread_atfork(nullptr, nullptr, &make_pool), true);
  (void)made;
  return *std::launder(reinterpret_cast<Pool*>(storage));
}

// ---- torch's own threads

// The entry of GCC's and LLVM's OpenMP runtimes for `#pragma omp parallel num_threads(n)`: f(data)
// on every thread of a team of n or fewer, the caller among them.
using Team = void (*)(void (*f)(void*), void* data, unsigned n, unsigned flags);

std::atomic<bool> borrowing{true};
// A child of fork has none of the runtime's threads, and the runtime would wait for them.
const int at_fork = pthread_atfork(nullptr, nullptr, [] { borrowing = false; });

// Null where the process has loaded no such runtime for all to see, as torch does.
Team team() {
  static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return borrowing.load(std::memory_order_relaxed) && at_fork == 0 ? found : nullptr;
}

struct Share {
  const Job* job;
  std::atomic<int64_t> taken{0};
};

void work_on_share(void* data) {
  Share& share = *static_cast<Share*>(data);
  for (int64_t chunk; (chunk = share.taken.fetch_add(1, std::memory_order_relaxed)) <
                      share.job->chunks;) {
    share.job->run(chunk);
  }
}

}  // namespace

void parallel_for_erased(int64_t n, int64_t grain, int nthreads, RangeFn fn, void* context) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = n / grain + (n % grain != 0 ? 1 : 0);
  const int threads = static_cast<int>(
      std::min<int64_t>(pieces, std::max(1, std::min(nthreads, MAX_THREADS))));
  if (threads == 1) {
    fn(context, 0, n);
    return;
  }
  Job job{fn, context, n, std::min(pieces, threads * CHUNKS_PER_THREAD), threads - 1};
  if (const Team run = team()) {
    Share share{&job};
    run(&work_on_share, &share, static_cast<unsigned>(std::min(nthreads, MAX_THREADS)), 0);
  } else {
    pool().run(job);
  }
}

void borrow_threads(bool wanted) { borrowing = wanted; }

bool borrows_threads() { return team() != nullptr; }

int pool_threads() { return pool().threads(); }

}  // namespace fastrlhf
