// Calls between two processes, for tests that are C++ code: the judged function is in one cell, the tests in another.
//
// The judged program ends with `int main() { rlsys::serve(&f); }`; the tests call `rlsys::Remote<decltype(&f)> candidate;`. Both are
// compiled from the same declaration, so arguments and results travel as raw little-endian values without tags:
// numbers as they lie in memory, strings and containers as a 64-bit count and their items, std::any and std::variant with an index.
// A message is a 64-bit length and a body, on descriptor 3. Whatever the judged side sends is checked against the length before it is read.
#pragma once
#include <any>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <type_traits>
#include <unistd.h>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace rlsys {

constexpr int channel = 3;
constexpr int gone = 99;  // exit code of tests whose judged side went away or broke the format
constexpr std::uint64_t longest = 64u << 20;

[[noreturn]] inline void leave(int code) { ::_exit(code); }

inline void transfer(char* data, std::uint64_t size, bool sending) {
    while (size) {
        ssize_t part = sending ? ::write(channel, data, size) : ::read(channel, data, size);
        if (part <= 0) leave(gone);
        data += part;
        size -= part;
    }
}

struct Message {
    std::string body;
    std::uint64_t position = 0;

    void add(const void* data, std::uint64_t size) { body.append(static_cast<const char*>(data), size); }
    void take(void* data, std::uint64_t size) {
        if (size > body.size() - position) leave(gone);
        std::memcpy(data, body.data() + position, size);
        position += size;
    }
    std::uint64_t count() {  // of items that take at least a byte each
        std::uint64_t n = 0;
        take(&n, sizeof n);
        if (n > body.size() - position) leave(gone);
        return n;
    }
    void send() {
        std::uint64_t size = body.size();
        transfer(reinterpret_cast<char*>(&size), sizeof size, true);
        transfer(body.data(), size, true);
    }
    static Message receive() {
        std::uint64_t size = 0;
        transfer(reinterpret_cast<char*>(&size), sizeof size, false);
        if (size > longest) leave(gone);
        Message message;
        message.body.resize(size);
        transfer(message.body.data(), size, false);
        return message;
    }
};

template <class T, class = void>
struct Wire {  // a user's type: as the std::variant that it holds in `value`
    static void put(Message& m, const T& x) { Wire<decltype(x.value)>::put(m, x.value); }
    static T get(Message& m) { return T(Wire<decltype(std::declval<T>().value)>::get(m)); }
};

template <class T>
struct Wire<T, std::enable_if_t<std::is_arithmetic_v<T>>> {
    static void put(Message& m, T x) { m.add(&x, sizeof x); }
    static T get(Message& m) {
        T x;
        if constexpr (std::is_same_v<T, bool>) {
            char byte;
            m.take(&byte, 1);
            return byte != 0;
        }
        m.take(&x, sizeof x);
        return x;
    }
};

template <>
struct Wire<std::string> {
    static void put(Message& m, const std::string& x) {
        Wire<std::uint64_t>::put(m, x.size());
        m.add(x.data(), x.size());
    }
    static std::string get(Message& m) {
        std::string x(m.count(), 0);
        m.take(x.data(), x.size());
        return x;
    }
};

template <>
struct Wire<const char*> {  // lives as long as the process, like a literal
    static void put(Message& m, const char* x) { Wire<std::string>::put(m, x); }
    static const char* get(Message& m) { return ::strdup(Wire<std::string>::get(m).c_str()); }
};

template <class C, class Item>
struct Sequence {
    static void put(Message& m, const C& x) {
        Wire<std::uint64_t>::put(m, x.size());
        for (const auto& item : x) Wire<Item>::put(m, item);
    }
    static C get(Message& m) {
        C x;
        for (std::uint64_t n = m.count(); n; --n) x.insert(x.end(), Wire<Item>::get(m));
        return x;
    }
};
template <class T> struct Wire<std::vector<T>> : Sequence<std::vector<T>, T> {};
template <class T> struct Wire<std::set<T>> : Sequence<std::set<T>, T> {};
template <class K, class V> struct Wire<std::map<K, V>> : Sequence<std::map<K, V>, std::pair<K, V>> {};

template <class K, class V>
struct Wire<std::unordered_map<K, V>> {
    static void put(Message& m, const std::unordered_map<K, V>& x) { Wire<std::map<K, V>>::put(m, {x.begin(), x.end()}); }
    static std::unordered_map<K, V> get(Message& m) {
        auto x = Wire<std::map<K, V>>::get(m);
        return {x.begin(), x.end()};
    }
};

template <class A, class B>
struct Wire<std::pair<A, B>> {
    static void put(Message& m, const std::pair<A, B>& x) {
        Wire<std::remove_const_t<A>>::put(m, x.first);
        Wire<B>::put(m, x.second);
    }
    static std::pair<A, B> get(Message& m) {
        auto first = Wire<std::remove_const_t<A>>::get(m);
        return {std::move(first), Wire<B>::get(m)};
    }
};

template <class... T>
struct Wire<std::tuple<T...>> {
    static void put(Message& m, const std::tuple<T...>& x) {
        std::apply([&](const auto&... item) { (Wire<std::decay_t<decltype(item)>>::put(m, item), ...); }, x);
    }
    static std::tuple<T...> get(Message& m) { return std::tuple<T...>{Wire<T>::get(m)...}; }  // braces: in order
};

template <class T>
struct Wire<std::optional<T>> {
    static void put(Message& m, const std::optional<T>& x) {
        Wire<bool>::put(m, x.has_value());
        if (x) Wire<T>::put(m, *x);
    }
    static std::optional<T> get(Message& m) {
        if (!Wire<bool>::get(m)) return std::nullopt;
        return Wire<T>::get(m);
    }
};

template <class... T>
struct Wire<std::variant<T...>> {
    static void put(Message& m, const std::variant<T...>& x) {
        Wire<std::uint64_t>::put(m, x.index());
        std::visit([&](const auto& item) { Wire<std::decay_t<decltype(item)>>::put(m, item); }, x);
    }
    static std::variant<T...> get(Message& m) { return get(m, std::index_sequence_for<T...>{}); }

  private:
    template <std::size_t... I>
    static std::variant<T...> get(Message& m, std::index_sequence<I...>) {
        std::uint64_t index = Wire<std::uint64_t>::get(m);
        std::optional<std::variant<T...>> x;
        ((index == I ? void(x.emplace(std::in_place_index<I>, Wire<T>::get(m))) : void()), ...);
        if (!x) leave(gone);
        return *x;
    }
};

template <>
struct Wire<std::any> {  // the types that tests put into one
    using Known = std::variant<int, long, float, double, bool, const char*, std::string, std::vector<long>, std::map<long, long>>;
    template <class T>
    static bool try_put(Message& m, const std::any& x) {
        if (x.type() != typeid(T)) return false;
        Wire<Known>::put(m, Known(std::in_place_type<T>, std::any_cast<T>(x)));
        return true;
    }
    static void put(Message& m, const std::any& x) {
        bool known = try_put<int>(m, x) || try_put<long>(m, x) || try_put<float>(m, x) || try_put<double>(m, x) || try_put<bool>(m, x) ||
                     try_put<const char*>(m, x) || try_put<std::string>(m, x) || try_put<std::vector<long>>(m, x) ||
                     try_put<std::map<long, long>>(m, x);
        if (!known) leave(gone);
    }
    static std::any get(Message& m) {
        return std::visit([](const auto& item) { return std::any(item); }, Wire<Known>::get(m));
    }
};

template <class F>
class Remote;

template <class R, class... A>
class Remote<R (*)(A...)> {
  public:
    std::decay_t<R> operator()(std::decay_t<A>... arguments) const {
        Message request;
        (Wire<std::decay_t<A>>::put(request, arguments), ...);
        request.send();
        Message reply = Message::receive();
        return Wire<std::decay_t<R>>::get(reply);
    }
};

template <class R, class... A>
void serve(R (*function)(A...)) {
    for (;;) {
        Message request = Message::receive();
        std::tuple<std::decay_t<A>...> arguments{Wire<std::decay_t<A>>::get(request)...};
        Message reply;
        Wire<std::decay_t<R>>::put(reply, std::apply(function, arguments));
        reply.send();
    }
}

}  // namespace rlsys
