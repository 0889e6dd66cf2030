#pragma once
#include <cstdint>

namespace stn_fast {

// Whether a parallel region gets as many threads as omp_get_max_threads() promises, by the rules of OpenMP 5.2, section 10.1.1.
// The arguments are addresses of OpenMP's own functions, in the runtime whose regions are meant: a process may have several.
inline bool full_team(std::uintptr_t max_threads, std::uintptr_t dynamic, std::uintptr_t thread_limit,
                      std::uintptr_t active_level, std::uintptr_t max_active_levels) {
    auto ask = [](std::uintptr_t function) { return reinterpret_cast<int (*)()>(function)(); };
    const int promised = ask(max_threads);
    if (promised <= 1) return true;
    return !ask(dynamic) && ask(thread_limit) >= promised && ask(active_level) < ask(max_active_levels);
}

}  // namespace stn_fast
