// Work items that threads take one after another, so that a thread that the system has stopped holds nobody up but for its
// own item; and nobody waits for a thread that has not come yet. OpenMP's regions end in a barrier for all of their threads:
// on a machine that is not idle each of them costs the time until the last one was given a core, also where it found nothing
// left to do.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>

// What Python finds in the library; everything else is hidden, and so called without a table.
#define SVG2_EXPORT __attribute__((visibility("default")))

namespace svg2 {

// Memory of its own for each thread, taken before the work begins: nothing can fail inside.
class Workspace {
  public:
    Workspace(int64_t threads, int64_t floats_per_thread)
        : floats_((floats_per_thread + 15) / 16 * 16 + 16),
          memory_((float*)std::aligned_alloc(64, threads * floats_ * sizeof(float))) {}
    ~Workspace() { std::free(memory_); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    bool missing() const { return memory_ == nullptr; }
    float* of_thread(int64_t thread) const { return memory_ + thread * floats_; }

  private:
    int64_t floats_;
    float* memory_;
};

// The items of one call. It may outlive the call in the hands of a thread that comes late, and finds no item left.
struct Job {
    void (*run)(const void* work, int64_t item, int64_t thread);
    const void* work;  // of the caller, who stays until all items are done
    int64_t count, threads;
    std::atomic<int64_t> next{0}, done{0}, members{1};  // the caller is thread 0
    std::mutex mutex;
    std::condition_variable finished;

    Job(void (*run)(const void*, int64_t, int64_t), const void* work, int64_t count, int64_t threads)
        : run(run), work(work), count(count), threads(threads) {}

    bool wants_members() const { return next.load() < count && members.load() < threads; }
    void take_items(int64_t thread);
    void wait();
};

// Shares the items of a job with the threads of the process's pool, and returns when all are done. In threads.cpp.
void run_shared(const std::shared_ptr<Job>& job);

// Calls work(item, thread) once for every item below count; items are begun in ascending order.
template <class Work>
void for_each_item(int64_t count, int64_t threads, const Work& work) {
    if (threads > count) threads = count;
    if (threads <= 1) {
        for (int64_t item = 0; item < count; ++item) work(item, 0);
        return;
    }
    const auto run = [](const void* of, int64_t item, int64_t thread) { (*(const Work*)of)(item, thread); };
    run_shared(std::make_shared<Job>(run, &work, count, threads));
}

}  // namespace svg2
