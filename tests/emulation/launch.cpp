// One kernel, KERNEL, compiled for the host; its arguments come as an array of 8-byte words.
#include <gated_lstm_persistent.cu>

namespace {

template <class Type>
Type as(long long word) {
    static_assert(sizeof(Type) == sizeof word, "arguments are pointers or 64-bit integers");
    Type value;
    std::memcpy(&value, &word, sizeof word);
    return value;
}

template <class... Types, std::size_t... Positions>
std::function<void()> with_arguments(void (*kernel)(Types...), const long long* words, std::index_sequence<Positions...>) {
    return [=] { kernel(as<Types>(words[Positions])...); };
}

template <class... Types>
const char* launch(void (*kernel)(Types...), const long long* words, int count, int blocks, std::size_t shared, unsigned order) {
    if (count != static_cast<int>(sizeof...(Types))) return "the kernel takes another number of arguments";
    const auto call = with_arguments(kernel, words, std::index_sequence_for<Types...>{});
    return stn_fast::emulated::launch(blocks, stn_fast::kThreads, shared, order, call);
}

}  // namespace

extern "C" const char* emulate(const long long* words, int count, int blocks, long long shared_bytes, unsigned order) {
    return launch(&KERNEL, words, count, blocks, static_cast<std::size_t>(shared_bytes), order);
}
