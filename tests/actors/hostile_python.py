"""Programs that try to break out, break in, or break the cell. Each says SAFE when every attempt failed.

name -> (source, outcome). Outcomes other than "ok" are verdicts of the program's own doing; "a|b" where the faster limit wins.
"""

# ruff: noqa: E501 - sources as table rows
from __future__ import annotations

_HEAD = """
import ctypes, errno, os, signal, sys, resource
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    return libc.syscall(ctypes.c_long(number), *args)
def refused(action, *args):
    try:
        result = action(*args)
    except (OSError, ValueError):
        return True
    return result == -1
def verdict(safe):
    print("SAFE" if safe else "BROKEN")
"""


def attempt(expression: str) -> tuple[str, str]:
    """Safe if `expression` is true."""
    return _HEAD + f"verdict({expression})\n", "ok"


HOSTILE: dict[str, tuple[str, str]] = {
    # ------------------------------------------------------------------------------------------------ processes
    "fork": attempt("refused(os.fork)"),
    "vfork": attempt("refused(call, 58)"),
    "raw clone": attempt("refused(call, 56, 17, 0, 0, 0, 0)"),
    "clone3": attempt("refused(call, 435, bytes(88), 88)"),
    "clone of a sharing process": attempt("refused(call, 56, 0x100 | 17, 0, 0, 0, 0)"),
    "clone into a namespace": attempt("refused(call, 56, 0x10000000 | 17, 0, 0, 0, 0)"),
    "thread in a new user namespace": attempt("refused(call, 56, 0x10000 | 0x800 | 0x100 | 0x10000000, 0, 0, 0, 0)"),
    "execve": attempt("refused(os.execv, '/usr/bin/env', ['env'])"),
    "execveat": attempt("refused(call, 322, -100, b'/usr/bin/env', None, None, 0)"),
    "posix_spawn": attempt("refused(os.posix_spawn, '/usr/bin/env', ['env'], {})"),
    "os.system": attempt("os.system('true') != 0"),
    "subprocess": ("import subprocess\ntry: subprocess.run(['/bin/true'])\nexcept OSError: print('SAFE')", "ok"),
    "multiprocessing": ("import multiprocessing as m\ntry: m.Process(target=print).start()\nexcept OSError: print('SAFE')", "ok"),
    "pty": ("import pty\ntry: pty.fork()\nexcept OSError: print('SAFE')", "ok"),
    "fork bomb": ("import os\nn = 0\nfor _ in range(10_000):\n    try: n += os.fork() > 0\n    except OSError: pass\nprint('SAFE' if n == 0 else n)", "ok"),
    "thread bomb": (
        "import threading, time\nn = 0\ntry:\n    while n < 10_000:\n        threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()\n"
        "        n += 1\nexcept RuntimeError: pass\nprint('SAFE' if n < 100 else n)",
        "ok",
    ),
    "a thread that outlives the program": ("import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()\n", "time_limit"),
    "a daemon thread that spins": (
        "import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f, daemon=True).start()\nprint('SAFE')",
        "ok",
    ),
    # ------------------------------------------------------------------------------------------------ signals and tracing
    "kill the zygote": attempt("(os.kill(1, 9) if os.getppid() == 1 else os.kill(os.getppid(), 9)) is None or True"),
    "interrupt the zygote": attempt("[refused(os.kill, os.getppid(), n) for n in range(1, 65)] and True"),
    "kill everybody": ("import os\nprint('SAFE', flush=True)\ntry: os.kill(-1, 9)\nexcept OSError: pass", "ok"),
    "kill the own group": ("import os\nprint('SAFE', flush=True)\nos.killpg(0, 9)", "runtime_error"),
    "tgkill the zygote": attempt("[call(234, os.getppid(), os.getppid(), n) for n in range(1, 65)] and True"),
    "tkill": attempt("refused(call, 200, os.getppid(), 9)"),
    "sigqueue": attempt("refused(call, 129, os.getppid(), 9, bytes(128))"),
    "pidfd of the zygote": attempt("refused(os.pidfd_open, os.getppid())"),
    "ptrace the zygote": attempt("refused(call, 101, 16, os.getppid(), 0, 0)"),
    "ptrace traceme": attempt("refused(call, 101, 0, 0, 0, 0)"),
    "read the zygote's memory": attempt("refused(call, 310, os.getppid(), bytes(16), 1, bytes(16), 1, 0)"),
    "write the zygote's memory": attempt("refused(call, 311, os.getppid(), bytes(16), 1, bytes(16), 1, 0)"),
    "limit the zygote's processor time": attempt("refused(resource.prlimit, os.getppid(), resource.RLIMIT_CPU, (1, 1))"),
    "limit the zygote's descriptors": attempt("refused(resource.prlimit, os.getppid(), resource.RLIMIT_NOFILE, (0, 0))"),
    "lower the zygote's priority": attempt("refused(os.setpriority, os.PRIO_PROCESS, os.getppid(), 19)"),
    "signals by descriptor owner": (
        "import fcntl, os, socket\na, b = socket.socketpair()\ntry:\n    fcntl.fcntl(a, fcntl.F_SETOWN, os.getppid())\n    print('BROKEN')\n"
        "except OSError: print('SAFE')",
        "ok",
    ),
    "signals by ioctl owner": (
        "import fcntl, os, socket, struct\na, b = socket.socketpair()\ntry:\n    fcntl.ioctl(a, 0x8901, struct.pack('i', os.getppid()))\n"
        "    print('BROKEN')\nexcept OSError: print('SAFE')",
        "ok",
    ),
    "kcmp": attempt("refused(call, 312, os.getppid(), os.getpid(), 0, 0, 0)"),
    "new session": attempt("refused(os.setsid)"),
    "new group": attempt("refused(os.setpgid, 0, 0)"),
    # ------------------------------------------------------------------------------------------------ limits
    "raise the processor limit": attempt("refused(resource.setrlimit, resource.RLIMIT_CPU, (1000, 1000))"),
    "raise the memory limit": attempt("refused(resource.setrlimit, resource.RLIMIT_AS, (-1, -1))"),
    "raise the output limit": attempt("refused(resource.setrlimit, resource.RLIMIT_FSIZE, (-1, -1))"),
    "raise the process limit": attempt("refused(resource.setrlimit, resource.RLIMIT_NPROC, (-1, -1))"),
    "spin": ("while True: pass", "time_limit"),
    "spin in C": ("sum(range(10 ** 12))", "time_limit"),
    "spin deaf to signals": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
        "time_limit",
    ),
    "spin with signals blocked": ("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass", "time_limit"),
    "spin in threads": ("import threading\nfor _ in range(8): threading.Thread(target=lambda: sum(range(10 ** 12))).start()", "time_limit"),
    "spin at exit": ("import atexit\ndef f():\n    while True: pass\natexit.register(f)", "time_limit"),
    "spin in a destructor": ("class A:\n    def __del__(self):\n        while True: pass\na = A()", "time_limit"),
    "backtracking expression": ("import re\nre.match('(a+)+$', 'a' * 60 + 'b')", "time_limit"),
    "a huge power": ("print(len(str(7 ** (10 ** 8))))", "time_limit"),
    "sleep": ("import time\ntime.sleep(1000)", "time_limit"),
    "pause": ("import signal\nsignal.pause()", "time_limit"),
    "stop itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "time_limit"),
    "deadlock": ("import threading\na = threading.Lock()\na.acquire()\na.acquire()", "time_limit"),
    "wait on an own pipe": ("import os\nr, w = os.pipe()\nos.read(r, 1)", "time_limit"),
    "memory in one piece": ("x = bytearray(1 << 40)", "memory_limit"),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory_limit"),
    "memory by mmap": ("import mmap\nx = []\ntry:\n    while True: x.append(mmap.mmap(-1, 1 << 26))\nexcept OSError: print('SAFE')", "ok"),
    "memory by deep recursion": (
        "import sys, threading\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
        "memory_limit|time_limit",
    ),
    "C stack": ("import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())", "runtime_error|memory_limit|time_limit"),
    "a list in itself": ("a = []\na.append(a)\nprint('SAFE')\nrepr(a)", "ok"),
    "parser bomb": ("exec('(' * 100_000)", "runtime_error"),
    "nested literal": ("eval('[' * 90 + ']' * 90)\nprint('SAFE')", "ok"),
    "null bytes in source": ("exec('\\0')", "runtime_error"),
    "segmentation fault": ("import ctypes\nctypes.string_at(1)", "runtime_error"),
    "abort": ("import os\nos.abort()", "runtime_error"),
    "bad code object": ("exec(compile('', '', 'exec').replace(co_code=b'\\xff' * 64, co_stacksize=0))", "runtime_error"),
    "flood stdout": ("while True: print('x' * 100_000)", "output_limit"),
    "flood stderr": ("import sys\nwhile True: sys.stderr.write('x' * 100_000)", "output_limit"),
    "flood raw": ("import os\ntry:\n    while True: os.write(1, b'x' * 100_000)\nexcept OSError: os._exit(0)", "output_limit"),
    "sparse stdout": ("import os\ntry: os.ftruncate(1, 1 << 40)\nexcept OSError: print('SAFE')", "ok"),
    "write far into stdout": ("import os\ntry: os.pwrite(1, b'x', 1 << 40)\nexcept OSError: print('SAFE')", "ok"),
    "seek stdout": ("import os\nos.write(1, b'BROKEN')\nos.lseek(1, 0, 0)\nos.ftruncate(1, 0)\nos.write(1, b'SAFE\\n')", "ok"),
    "descriptor bomb": ("import os\ntry:\n    while True: os.dup(0)\nexcept OSError: print('SAFE')", "ok"),
    "pipe bomb": ("import os\ntry:\n    while True: os.pipe()\nexcept OSError: print('SAFE')", "ok"),
    "epoll bomb": ("import select\nx = []\ntry:\n    while True: x.append(select.epoll())\nexcept OSError: print('SAFE')", "ok"),
    "close everything": ("import os\nos.closerange(0, 1000)", "ok"),
    # ------------------------------------------------------------------------------------------------ files
    "read passwords": attempt("refused(open, '/etc/passwd')"),
    "read shadow": attempt("refused(open, '/etc/shadow')"),
    "read the home of root": attempt("refused(os.listdir, '/root/.ssh')"),
    "read the project": attempt("refused(open, 'PROJECT/pyproject.toml')"),
    "read proc": attempt("refused(open, '/proc/1/environ') and refused(open, '/proc/1/mem') and refused(os.listdir, '/proc/1')"),
    "read sys": attempt("refused(os.listdir, '/sys/kernel')"),
    "read devices": attempt("refused(open, '/dev/mem') and refused(open, '/dev/vda') and refused(open, '/dev/kmsg')"),
    "read a docker socket": attempt("refused(open, '/var/run/docker.sock') and refused(os.listdir, '/var/run')"),
    "climb out": attempt("refused(open, '/../../../../etc/passwd') and refused(open, '/usr/../etc/passwd')"),
    "write libraries": attempt("refused(open, '/usr/lib/rlsys', 'w') and refused(open, '/lib/rlsys', 'w') and refused(open, '/rlsys', 'w')"),
    "write the interpreter": attempt("all(refused(open, os.path.join(p, 'rlsys'), 'w') for p in sys.path)"),
    "write packages": attempt("refused(open, '/packages/rlsys', 'w') and refused(os.mkdir, '/packages/rlsys')"),
    "remove libraries": attempt("refused(os.unlink, os.__file__) and refused(os.rename, os.__file__, '/tmp/os.py')"),
    "truncate libraries": attempt("refused(os.truncate, os.__file__, 0)"),
    "make a device": attempt("refused(os.mknod, '/tmp/d', 0o60666, 0)"),
    "make a fifo": attempt("refused(os.mkfifo, '/tmp/f')"),
    "symlink": attempt("refused(os.symlink, '/etc/passwd', '/tmp/l')"),
    "hard link": attempt("refused(os.link, os.__file__, '/tmp/l')"),
    "chmod": attempt("refused(os.chmod, '/tmp', 0o777)"),
    "setuid file": attempt("refused(os.chmod, '/usr/bin/env', 0o4755)"),
    "chroot": attempt("refused(os.chroot, '/tmp')"),
    "mount": attempt("refused(call, 165, b'x', b'/tmp', b'tmpfs', 0, None)"),
    "unmount": attempt("refused(call, 166, b'/tmp', 2) and refused(call, 166, b'/usr', 2)"),
    "new mount calls": attempt("all(refused(call, n, -100, b'/', 0, 0, 0) for n in (428, 429, 430, 431, 432, 433, 442))"),
    "pivot root": attempt("refused(call, 155, b'.', b'.')"),
    "open by handle": attempt("refused(call, 304, -100, bytes(16), 0)"),
    "inotify": attempt("refused(call, 294, 0)"),
    "fanotify": attempt("refused(call, 300, 0, 0)"),
    # ------------------------------------------------------------------------------------------------ network and kernel surface
    "connect": ("import socket\ntry: socket.create_connection(('127.0.0.1', 22), 1)\nexcept OSError: print('SAFE')", "ok"),
    "resolve": ("import socket\ntry: socket.getaddrinfo('example.org', 80)\nexcept OSError: print('SAFE')", "ok"),
    "udp": attempt("refused(call, 41, 2, 2, 0)"),
    "raw socket": attempt("refused(call, 41, 2, 3, 255)"),
    "netlink": attempt("refused(call, 41, 16, 3, 0)"),
    "packet socket": attempt("refused(call, 41, 17, 3, 0)"),
    "abstract unix socket": attempt("refused(call, 41, 1, 1, 0)"),
    "vsock": attempt("refused(call, 41, 40, 1, 0)"),
    "socketpair of another family": attempt("refused(call, 53, 2, 1, 0, bytes(8))"),
    "user namespace": attempt("refused(call, 272, 0x10000000)"),
    "all namespaces": attempt("refused(call, 272, 0x7E020000)"),
    "setns": attempt("refused(call, 308, 0, 0)"),
    "setuid": attempt("refused(os.setuid, 0) and refused(os.setgid, 0) and refused(os.setgroups, [0])"),
    "capset": attempt("refused(call, 126, bytes(8), bytes(24))"),
    "prctl": attempt("refused(call, 157, 4, 1, 0, 0, 0)"),
    "bpf": attempt("refused(call, 321, 0, bytes(64), 64)"),
    "perf": attempt("refused(call, 298, bytes(64), 0, -1, -1, 0)"),
    "userfaultfd": attempt("refused(call, 323, 0)"),
    "io_uring": attempt("refused(call, 425, 8, bytes(120))"),
    "keyring": attempt("refused(call, 250, 0, -3, 1) and refused(call, 248, b'user', b'x', b'y', 1, -3)"),
    "memfd": attempt("refused(os.memfd_create, 'x')"),
    "system v": attempt("refused(call, 29, 0, 4096, 0o666) and refused(call, 64, 0, 1, 0o666) and refused(call, 68, 0, 0o666)"),
    "message queues": attempt("refused(call, 240, b'/x', 66, 0o600, None)"),
    "modules": attempt("refused(call, 175, b'', 0, b'') and refused(call, 313, 0, b'', 0)"),
    "kexec and reboot": attempt("refused(call, 246, 0, 0, None, 0) and refused(call, 169, 0xfee1dead, 672274793, 0, None)"),
    "clock": attempt("refused(call, 227, 0, bytes(16)) and refused(call, 164, bytes(16), None)"),
    "host name": attempt("refused(call, 170, b'x', 1)"),
    "scheduler": attempt("refused(call, 144, 0, 1, bytes(4)) and refused(call, 203, 0, 8, bytes(8))"),
    "swap and quota": attempt("refused(call, 167, b'/tmp/x', 0) and refused(call, 179, 0, None, 0, None)"),
    "seccomp again": attempt("refused(call, 317, 1, 0, bytes(16))"),
    "personality": attempt("refused(call, 135, 0x0400000)"),
    "x32 calls": ("import ctypes\nctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 + 39))\nprint('BROKEN')", "runtime_error"),
    "splice and sendfile": attempt("refused(call, 275, 0, None, 1, None, 1, 0) and refused(call, 40, 1, 0, None, 1)"),
    "pass descriptors": (
        "import socket, array\na, b = socket.socketpair()\ntry:\n    a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0]))])\n"
        "    print('BROKEN')\nexcept OSError: print('SAFE')",
        "ok",
    ),
    "find a foreign descriptor": attempt("all(refused(os.fstat, n) for n in range(3, 256))"),
    # ------------------------------------------------------------------------------------------------ the zygote's own code, in the fork
    "walk the frames": (
        "import sys\nf = sys._getframe()\nseen = []\nwhile f:\n    seen += [k for k in f.f_locals if 'expected' in k or 'output' == k]\n    f = f.f_back\n"
        "print('BROKEN' if seen else 'SAFE')",
        "ok",
    ),
    "rewrite the zygote's functions": (
        "import gc, types\nfor o in gc.get_objects():\n    if isinstance(o, types.FunctionType) and 'sandbox' in (o.__module__ or ''):\n"
        "        o.__code__ = (lambda *a, **k: None).__code__\nprint('SAFE')",
        "ok",
    ),
    "replace os._exit": ("import os\nos._exit = lambda code: None\nprint('SAFE')", "ok"),
    "empty the modules": ("import sys\nprint('SAFE', flush=True)\nsys.modules.clear()", "ok"),
    "break the builtins": ("import builtins\nprint('SAFE', flush=True)\nfor n in list(vars(builtins)): delattr(builtins, n)", "runtime_error"),
    "pretend a fault of the sandbox": ("import os, sys\nsys.stderr.write('fork failed')\nsys.stderr.flush()\nos._exit(120)", "runtime_error"),
    "map over the shared page": (
        "import mmap\nm = mmap.mmap(-1, 4096)\nm[0] = 0\nprint('SAFE')",
        "ok",
    ),
    "exit code 0 after a crash": ("import atexit, os\natexit.register(os._exit, 0)\n1 / 0", "ok"),
    # ------------------------------------------------------------------------------------------------ what it leaves behind
    "fill tmp": ("f = open('/tmp/x', 'wb')\ntry:\n    while True: f.write(b'x' * 65536)\nexcept OSError: print('SAFE')", "ok"),
    "fill the inodes": ("n = 0\ntry:\n    while True:\n        open(f'/tmp/{n}', 'w').close()\n        n += 1\nexcept OSError: print('SAFE')", "ok"),
    "bury a file": (
        "import os\ntry:\n    for _ in range(500):\n        os.mkdir('d')\n        os.chdir('d')\n    open('x', 'w').write('x')\nexcept OSError: pass\nprint('SAFE')",
        "ok",
    ),
    "lock a directory": ("import os\ntry: os.mkdir('/tmp/locked', 0)\nexcept OSError: pass\nprint('SAFE')", "ok"),
    "odd names": (
        "import os\nfor n in (b'\\xff\\xfe', b'a\\nb', b'-rf', b' '):\n    try: open(b'/tmp/' + n, 'w').close()\n    except OSError: pass\nprint('SAFE')",
        "ok",
    ),
    "change the current directory": ("import os\nos.chdir('/usr')\nprint('SAFE')", "ok"),
    "poison the caches": ("import sys\nsys.path.insert(0, '/tmp')\ntry: open('/tmp/heapq.py', 'w').write('raise SystemExit(0)')\nexcept OSError: pass\nprint('SAFE')", "ok"),
}  # fmt: skip
