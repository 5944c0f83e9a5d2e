"""The same in C++, where no interpreter stands between the program and the kernel. SAFE when every attempt failed."""

# ruff: noqa: E501 - sources as table rows
from __future__ import annotations

_HEAD = """
#include <bits/stdc++.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
using namespace std;
static int verdict(bool safe) { puts(safe ? "SAFE" : "BROKEN"); fflush(stdout); return 0; }
"""


def attempt(expression: str) -> tuple[str, str]:
    """Safe if `expression` is true."""
    return _HEAD + f"int main() {{ return verdict({expression}); }}\n", "ok"


def body(statements: str, outcome: str) -> tuple[str, str]:
    """A main function."""
    return _HEAD + f"int main() {{ {statements} }}\n", outcome


HOSTILE: dict[str, tuple[str, str]] = {
    "fork and vfork": attempt("fork() < 0 && vfork() < 0"),
    "clone and clone3": attempt("syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) < 0 && syscall(435, 0, 0) < 0"),
    "run a shell": attempt('system("true") != 0 && popen("true", "r") == nullptr'),
    "exec another program": body(
        'char* a[] = {(char*)"/usr/bin/env", (char*)"printf", (char*)"BROKEN\\n", nullptr}; char* e[] = {nullptr}; execve(a[0], a, e);'
        ' syscall(SYS_execveat, AT_FDCWD, a[0], a, e, 0); int f = open(a[0], O_RDONLY); syscall(SYS_execveat, f, "", a, e, AT_EMPTY_PATH);'
        ' verdict(f >= 0 && dup2(f, 250) < 0);',
        "ok",
    ),
    "kill the zygote": attempt("(kill(1, SIGKILL), kill(1, SIGINT), kill(1, SIGTERM), kill(getppid(), SIGSEGV), true)"),
    "trace the zygote": attempt("ptrace(PTRACE_ATTACH, getppid(), 0, 0) < 0 && ptrace(PTRACE_TRACEME, 0, 0, 0) < 0"),
    "limit the zygote": body("rlimit l = {1, 1}; return verdict(prlimit(getppid(), RLIMIT_CPU, &l, nullptr) < 0);", "ok"),
    "sockets": attempt("socket(AF_INET, SOCK_STREAM, 0) < 0 && socket(AF_UNIX, SOCK_STREAM, 0) < 0 && socket(AF_NETLINK, SOCK_RAW, 0) < 0"),
    "read the host": attempt('open("/etc/passwd", O_RDONLY) < 0 && open("/proc/1/environ", O_RDONLY) < 0 && open("/root/.bashrc", O_RDONLY) < 0'),
    "write the host": attempt('open("/usr/x", O_CREAT | O_WRONLY, 0666) < 0 && open("/x", O_CREAT | O_WRONLY, 0666) < 0'),
    "foreign descriptors": body("bool safe = true; for (int n = 4; n < 1024; n++) safe &= fcntl(n, F_GETFD) < 0; return verdict(safe);", "ok"),
    "namespaces": attempt("unshare(CLONE_NEWUSER) < 0 && syscall(SYS_setns, 0, 0) < 0"),
    "mounts": attempt('syscall(SYS_mount, "x", "/tmp", "tmpfs", 0, 0) < 0 && chroot("/tmp") < 0'),
    "become root": attempt("setuid(0) < 0 && setgid(0) < 0 && seteuid(0) < 0"),
    "raise limits": body("rlimit l = {RLIM_INFINITY, RLIM_INFINITY}; return verdict(setrlimit(RLIMIT_CPU, &l) < 0 && setrlimit(RLIMIT_AS, &l) < 0);", "ok"),
    "32-bit calls": body('long r = 20; asm volatile("int $0x80" : "+a"(r)); puts("BROKEN");', "runtime_error"),
    "x32 calls": body('syscall(0x40000000 + 39); puts("BROKEN");', "runtime_error"),
    "spin": body("for (volatile long i = 0;; i = i + 1) {}", "time_limit"),
    "spin deaf": body("for (int n = 1; n < 65; n++) signal(n, SIG_IGN); for (volatile long i = 0;; i = i + 1) {}", "time_limit"),
    "spin in threads": body(
        "vector<thread> t; for (int k = 0; k < 4; k++) t.emplace_back([] { for (volatile long i = 0;; i = i + 1) {} }); for (auto& x : t) x.join();",
        "time_limit|runtime_error",
    ),
    "spin before main": (_HEAD + "struct A { A() { for (volatile long i = 0;; i = i + 1) {} } } a;\nint main() {}", "time_limit"),
    "sleep": body("sleep(1000);", "time_limit"),
    "stop itself": body("raise(SIGSTOP);", "time_limit"),
    "hoard with new": body("for (;;) { char* p = new char[1 << 20]; memset(p, 1, 1 << 20); }", "memory_limit"),
    "hoard with malloc": body("for (;;) { void* p = malloc(1 << 24); if (!p) return verdict(true); }", "ok"),
    "hoard with mmap": body(
        "for (;;) if (mmap(0, 1 << 26, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED) return verdict(true);", "ok"
    ),
    "endless recursion": (_HEAD + "int f(int n) { volatile char c[4096]; c[0] = n; return f(n + 1) + c[0]; }\nint main() { return f(0); }", "runtime_error|memory_limit"),
    "flood stdout": body('string s(1 << 16, \'x\'); for (;;) fwrite(s.data(), 1, s.size(), stdout);', "output_limit"),
    "flood stderr": body('string s(1 << 16, \'x\'); for (;;) fwrite(s.data(), 1, s.size(), stderr);', "output_limit"),
    "flood deaf": body('signal(SIGXFSZ, SIG_IGN); string s(1 << 16, \'x\'); while (write(1, s.data(), s.size()) > 0) {}', "output_limit"),
    "thread bomb": body(
        "vector<thread> t; try { for (;;) t.emplace_back([] { sleep(1); }); } catch (system_error&) {} puts(t.size() < 100 ? \"SAFE\" : \"BROKEN\");"
        " fflush(stdout); _exit(0);",
        "ok",
    ),
    "null pointer": body("*(volatile int*)0 = 1;", "runtime_error"),
    "uncaught exception": body('throw runtime_error("x");', "runtime_error"),
    "abort": body("abort();", "runtime_error"),
    "divide by zero": body("volatile int a = 7, z = 0; return a / z;", "runtime_error"),
    "executable memory": body(
        "auto p = (unsigned char*)mmap(0, 4096, 7, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); if (p == MAP_FAILED) return verdict(true);"
        " p[0] = 0xb8; p[1] = 57; p[2] = p[3] = p[4] = 0; p[5] = 0x0f; p[6] = 5; p[7] = 0xc3; return verdict(((long (*)())p)() < 0);",
        "ok",
    ),
    "fill tmp": body('FILE* f = fopen("/tmp/x", "w"); string s(1 << 16, \'x\'); while (f && fwrite(s.data(), 1, s.size(), f) == s.size()) {} return verdict(true);', "output_limit"),
}  # fmt: skip

COMPILE_BOMBS: dict[str, str] = {
    "include a secret": '#include "/etc/passwd"\nint main() {}',
    "include the random device": '#include "/dev/urandom"\nint main() {}',
    "include itself": "#include __FILE__\nint main() {}",
    "huge array": "int a[1L << 40] = {1};\nint main() {}",
    "incbin a secret": 'asm(".incbin \\"/etc/passwd\\"");\nint main() {}',
    "endless templates": "template <class T> struct A { typename A<A<T>>::type x; };\nint main() { A<int> a; }",
    "not a program": "hello",
}
"""Sources that must end as compile_error: none of them reads the host, hangs or fills memory."""
