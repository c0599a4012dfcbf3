// One parallel region for an operator: threads take work items one after another, so that a thread that the system has
// stopped holds nobody up but for its own item. There is no barrier but the end.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#if defined(SVG2_STD_THREADS)
#include <thread>
#include <vector>
#endif

// What Python finds in the library; everything else is hidden, and so called without a table.
#define SVG2_EXPORT __attribute__((visibility("default")))

namespace svg2 {

// Memory of its own for each thread, taken before the region: nothing can fail inside.
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

// Calls work(item, thread) once for every item below count; items are begun in ascending order.
template <class Work>
void for_each_item(int64_t count, int64_t threads, const Work& work) {
    if (threads > count) threads = count;
    if (threads <= 1) {
        for (int64_t item = 0; item < count; ++item) work(item, 0);
        return;
    }
    std::atomic<int64_t> next{0};
#if defined(SVG2_STD_THREADS)  // for the thread sanitizer, which does not see what OpenMP's own library does
    std::vector<std::thread> team;
    for (int64_t thread = 0; thread < threads; ++thread) {
        team.emplace_back([&, thread] {
            for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(item, thread);
        });
    }
    for (std::thread& member : team) member.join();
#else
    std::atomic<int64_t> thread_of{0};
#pragma omp parallel num_threads((int)threads)
    {
        const int64_t thread = thread_of.fetch_add(1, std::memory_order_relaxed);
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(item, thread);
    }
#endif
}

}  // namespace svg2
