// The pool behind pool.h. Helpers sleep until a job is posted, then take chunks from one counter like the caller.
#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace tw {
namespace {

constexpr size_t kMinElements = size_t{1} << 19;
constexpr size_t kChunkElements = size_t{1} << 16;  // 256 KB of float32: some 10 microseconds
constexpr int kSpins = 2000;

int processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count ? static_cast<int>(count) : 1;
}

long process() {
#if defined(_WIN32)
    return 0;  // no fork
#else
    return static_cast<long>(getpid());
#endif
}

struct Job {
    void (*work)(void*, size_t, size_t) = nullptr;
    void* context = nullptr;
    size_t n = 0;
    size_t chunk = 0;
    uint32_t chunks = 0;
    int helpers = 0;
    uint32_t epoch = 0;
};

class Pool {
public:
    // False, with nothing done, if another call has the pool.
    bool run(Job job) {
        const std::unique_lock<std::mutex> mine(in_use_, std::try_to_lock);
        if (!mine.owns_lock()) return false;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            start(job.helpers);
            job.epoch = ++epoch_;
            job_ = job;
            finished_.store(0, std::memory_order_relaxed);
            next_.store(uint64_t{job.epoch} << 32, std::memory_order_release);
        }
        wake_.notify_all();
        take_chunks(job);
        for (int spin = 0; spin < kSpins; ++spin) {
            if (finished_.load(std::memory_order_acquire) == job.chunks) return true;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return finished_.load(std::memory_order_acquire) == job.chunks; });
        return true;
    }

private:
    // Starts the requested number of helpers, or as many as the system allows.
    void start(int helpers) {
        try {
            for (; started_ < helpers; ++started_) std::thread(&Pool::help, this, started_).detach();
        } catch (const std::system_error&) {
        }
    }

    void help(int index) {
        uint32_t seen = 0;
        for (;;) {
            Job job;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return epoch_ != seen; });
                seen = epoch_;
                job = job_;
            }
            if (index < job.helpers) take_chunks(job);
        }
    }

    // The counter holds the epoch and the next chunk. A late helper finds a different epoch or no chunk left, so it
    // never touches a job whose caller may have returned.
    void take_chunks(const Job& job) {
        uint64_t next = next_.load(std::memory_order_acquire);
        while (next >> 32 == job.epoch && static_cast<uint32_t>(next) < job.chunks) {
            if (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) continue;
            const size_t begin = static_cast<uint32_t>(next) * job.chunk;
            job.work(job.context, begin, job.n - begin < job.chunk ? job.n - begin : job.chunk);
            if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == job.chunks) {
                const std::lock_guard<std::mutex> lock(mutex_);
                done_.notify_all();
            }
            next = next_.load(std::memory_order_acquire);
        }
    }

    std::mutex in_use_;
    std::mutex mutex_;  // guards job_, epoch_, started_ and both conditions
    std::condition_variable wake_, done_;
    Job job_;
    uint32_t epoch_ = 0;
    int started_ = 0;
    std::atomic<uint64_t> next_{0};
    std::atomic<uint32_t> finished_{0};
};

// Never destroyed: helpers may outlive static destruction, and a forked child must not touch its parent's locks.
struct Owner {
    Pool* pool;
    long process;
};
std::atomic<Owner*> owner{nullptr};

Pool& pool() {
    Owner* current = owner.load(std::memory_order_acquire);
    while (!current || current->process != process()) {
        Owner* fresh = new Owner{new Pool, process()};
        if (owner.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) return *fresh->pool;
        delete fresh->pool;
        delete fresh;
    }
    return *current->pool;
}

std::atomic<int> count{1};

}  // namespace

int threads() { return count.load(std::memory_order_relaxed); }
void set_threads(int n) { count.store(n < 1 ? 1 : n, std::memory_order_relaxed); }

void share(size_t n, size_t granule, void (*work)(void*, size_t, size_t), void* context) {
    const size_t chunk = (kChunkElements + granule - 1) / granule * granule;
    const size_t chunks = n / chunk + (n % chunk != 0);
    const int wanted = threads();
    if (wanted > 1 && n >= kMinElements && chunks > 1 && chunks <= UINT32_MAX) {
        const int available = processors();
        Job job;
        job.work = work;
        job.context = context;
        job.n = n;
        job.chunk = chunk;
        job.chunks = static_cast<uint32_t>(chunks);
        job.helpers = (wanted < available ? wanted : available) - 1;
        if (job.helpers > 0 && pool().run(job)) return;
    }
    work(context, 0, n);
}

}  // namespace tw
