// The threads of the native code: one pool for a process, of as many as any call asked for, asleep in between.

#include <pthread.h>

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace svg2 {
namespace {

// Of what a thread does before it sleeps: the ops of an attention follow each other within some tens of microseconds.
constexpr int SPINS = 2000;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

class Pool {
  public:
    void post(const std::shared_ptr<Job>& job) {
        const std::lock_guard<std::mutex> lock(mutex_);
        try {
            for (; threads_ + 1 < job->threads; ++threads_) std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {  // no more are to be had: those that there are do it all
        }
        jobs_.push_back(job);
        posted_.fetch_add(1);
        for (int64_t i = 1; i < job->threads; ++i) wake_.notify_one();
    }

    void withdraw(const std::shared_ptr<Job>& job) {
        const std::lock_guard<std::mutex> lock(mutex_);
        jobs_.erase(std::find(jobs_.begin(), jobs_.end(), job));
    }

  private:
    void work() {
        for (;;) {
            const std::shared_ptr<Job> job = next();
            const int64_t thread = job->members.fetch_add(1);
            if (thread < job->threads) job->take_items(thread);
        }
    }

    // The oldest job that wants members: waits until there is one.
    std::shared_ptr<Job> next() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            for (const auto& job : jobs_) {
                if (job->wants_members()) return job;
            }
            const int64_t seen = posted_.load();
            lock.unlock();
            for (int spin = 0; spin < SPINS && posted_.load() == seen; ++spin) pause();
            lock.lock();
            wake_.wait(lock, [&] { return posted_.load() != seen; });
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::shared_ptr<Job>> jobs_;
    std::atomic<int64_t> posted_{0};
    int64_t threads_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};

// Never freed: its threads run until the process ends.
Pool& pool() {
    static std::once_flag once;
    // Threads do not survive a fork: the child begins with a pool of its own.
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); }); });
    Pool* found = the_pool.load();
    if (found == nullptr) {
        Pool* made = new Pool;
        if (the_pool.compare_exchange_strong(found, made)) return *made;
        delete made;
    }
    return *found;
}

}  // namespace

void Job::take_items(int64_t thread) {
    int64_t taken = 0;
    for (int64_t item; (item = next.fetch_add(1)) < count; ++taken) run(work, item, thread);
    if (taken > 0 && done.fetch_add(taken) + taken == count) {
        const std::lock_guard<std::mutex> lock(mutex);
        finished.notify_one();
    }
}

void Job::wait() {
    for (int spin = 0; spin < SPINS && done.load() < count; ++spin) pause();
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [&] { return done.load() == count; });
}

void run_shared(const std::shared_ptr<Job>& job) {
    Pool& threads = pool();
    threads.post(job);
    job->take_items(0);
    threads.withdraw(job);
    job->wait();
}

}  // namespace svg2
