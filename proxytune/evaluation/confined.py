"""The inside of the sandbox: a small server that forks a confined process for each program it is sent.

Run as a script by `sandbox.py`, maybe on another and older interpreter (3.7 on), so it imports the standard library
only. It first shuts itself in, then reads requests on standard input, each four bytes of length and JSON, and answers
each in the same form. A program runs in a grandchild:

    server    in namespaces of its own for files and network; never runs a program's code itself
      keeper    first of a process namespace; ends the program after its time, and whatever it has left behind
        program   a process group of its own, an empty folder, limits, no privileges

At its end a program's process says a token that stands in no file and no pipe: leaving early in any way says nothing,
nor does writing to whatever is open. A program may come in parts, such as a solution and its tests: builtins that one
part replaced are put back for the next.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import importlib
import json
import os
import resource
import secrets
import select
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback

WORK = "/.program"
NEW_FILES, NEW_UTS, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PIDS, NEW_NET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
SET_PDEATHSIG, SET_DUMPABLE, SET_SECCOMP, SET_SUBREAPER, SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
FIRST_USER, NOBODY = 1_000_000, 65534  # of users that own nothing, one a server so that processes can be counted
CHUNK = 1 << 16
SLACK = 5.0  # seconds that the keeper has to end everything

libc = ctypes.CDLL(None, use_errno=True)


def check(returned: int, what: str) -> None:
    if returned < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def prctl(option: int, value: int) -> None:
    check(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    made = libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    check(made, f"mount {target}")


def restrict(path: str, attributes: int, recursive: bool = True) -> None:
    """Set attributes of the mounts at and below a path; locked ones stay as they are."""
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    called = libc.syscall(
        ctypes.c_long(MOUNT_SETATTR), AT_FDCWD, path.encode(), ctypes.c_uint(flags), wanted, ctypes.c_size_t(32)
    )
    check(called, f"mount_setattr {path}")


def shut_in(config: dict) -> None:
    """Namespaces without a network, and a file system with nothing in it but what programs need, read-only."""
    own = NEW_FILES | NEW_NET | NEW_IPC | NEW_UTS
    uid, gid = os.getuid(), os.getgid()
    if uid != 0 or libc.unshare(own) < 0:
        check(libc.unshare(own | NEW_USER), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    root = config["root"]
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path in config["visible"]:
        show(root, path, READ_ONLY | MS_NOSUID | MS_NODEV)
    for device in ("null", "zero", "full", "random", "urandom"):
        show(root, "/dev/" + device, MS_NOSUID)
    # The old /proc is needed where a new one is mounted without privileges; a program sees its own or none.
    os.makedirs(root + "/proc")
    mount("/proc", root + "/proc", flags=MS_BIND | MS_REC)
    os.mkdir(root + WORK)
    if not os.path.exists(root + "/tmp"):  # an interpreter may lie below it
        os.symlink(WORK, root + "/tmp")
    os.chdir(root)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")
    restrict("/", READ_ONLY, recursive=False)


def show(root: str, path: str, attributes: int) -> None:
    """Make a file or folder of the outside visible at the same place inside."""
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        open(target, "a").close()
    mount(path, target, flags=MS_BIND | MS_REC)
    restrict(target, attributes)


def serve(answers: int, config: dict) -> None:
    requests = os.dup(0)
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    while True:
        header = read_exactly(requests, 4)
        if not header:
            return
        request = json.loads(read_exactly(requests, struct.unpack("!I", header)[0]))
        answer(answers, execute(request, config))


def answer(target: int, told: dict) -> None:
    text = json.dumps(told).encode()
    data = struct.pack("!I", len(text)) + text
    while data:
        data = data[os.write(target, data) :]


def read_exactly(source: int, count: int) -> bytes:
    parts = b""
    while len(parts) < count:
        part = os.read(source, count - len(parts))
        if not part:
            return b""
        parts += part
    return parts


def execute(request: dict, config: dict) -> dict:
    """Run one program; what it wrote, how it ended, whether it came to its end."""
    limits = config["limits"]
    token = secrets.token_hex(16).encode()
    (output, output_end), (verdict, verdict_end) = os.pipe(), os.pipe()
    folder = tempfile.mkdtemp() if config["confinement"] == "limits" else ""
    started = time.monotonic()
    keeper = os.fork()
    if not keeper:
        try:
            keep(request["program"], token, config, folder, (output_end, verdict_end))
        finally:
            os._exit(1)
    for end in (output_end, verdict_end):
        os.close(end)
    written, told = drain(output, verdict, limits, started + limits["wall_seconds"] + SLACK)
    with contextlib.suppress(OSError):
        os.kill(keeper, signal.SIGKILL)  # it has ended by now, or does not do its work
    os.waitpid(keeper, 0)
    os.close(output)
    os.close(verdict)
    if folder:
        with contextlib.suppress(RecursionError):  # of folders in folders in folders
            shutil.rmtree(folder, ignore_errors=True)
    lines = told.rstrip(b"\n").split(b"\n")
    return {
        "status": status_of(lines, token),
        "output": written[: limits["output"]].decode(errors="replace"),
        "seconds": time.monotonic() - started,
        "broken": "" if lines[0] == b"ready" else told.decode(errors="replace").strip() or "no answer",
    }


def status_of(told: list, token: bytes) -> str:
    """Of the lines of the verdict: the program's own is the token, the keeper's last one says how it ended."""
    if told[-1] in (b"ended wall", b"ended cpu"):
        return "timed out"
    return "passed" if told[1:2] == [token] and told[-1] == b"ended 0" else "failed"


def drain(output: int, verdict: int, limits: dict, deadline: float) -> tuple:
    """What comes from both pipes until the keeper has closed its end of `verdict`, capped."""
    kept = {output: b"", verdict: b""}
    open_ends = [output, verdict]
    while verdict in open_ends:
        ready, _, _ = select.select(open_ends, [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for source in ready:
            part = os.read(source, CHUNK)
            if not part:
                open_ends.remove(source)
            elif len(kept[source]) < limits["output"]:
                kept[source] += part
    return kept[output], kept[verdict]


def keep(program, token: bytes, config: dict, folder: str, ends: tuple) -> None:
    """The keeper: start the program, wait, end everything that it started, say how it went. Does not return."""
    say, limits = ends[1], config["limits"]
    try:
        enter(config)
        prctl(SET_SUBREAPER, 1)
        prctl(SET_DUMPABLE, 0)  # no debugger for a program of the same user
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        child = os.fork()
        if not child:
            try:
                confine(config, folder, ends)
                os.write(say, b"ready\n")
                perform([program] if isinstance(program, str) else program, token, say)
            except BaseException as error:
                os.write(say, f"broken {type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(1)
        how = await_end(child, limits)
        if config["confinement"] == "limits":
            sweep(config["user"])
        os.write(say, b"\nended " + how + b"\n")
    except OSError as error:
        os.write(say, f"\nbroken {error}\n".encode())
    os._exit(0)


def enter(config: dict) -> None:
    """Go on as the first process of a namespace, with which all others end; the process that was forked waits."""
    prctl(SET_PDEATHSIG, signal.SIGKILL)
    if config["confinement"] == "isolated":
        check(libc.unshare(NEW_PIDS | NEW_FILES | NEW_IPC), "unshare")
        first = os.fork()
        if first:
            os.waitpid(first, 0)
            os._exit(0)
        prctl(SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()


def await_end(child: int, limits: dict) -> bytes:
    """`wall` or `cpu` for a program that used up its time, else its exit status or the signal that ended it."""
    deadline = time.monotonic() + limits["wall_seconds"]
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            break
        left = deadline - time.monotonic()
        if left <= 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return b"wall"
        signal.sigtimedwait({signal.SIGCHLD}, left)
    if not os.WIFSIGNALED(status):
        return str(os.WEXITSTATUS(status)).encode()
    worn_out = used.ru_utime + used.ru_stime >= limits["cpu_seconds"] - 0.5
    return b"cpu" if worn_out else b"signal %d" % os.WTERMSIG(status)


def sweep(user: int) -> None:
    """End what the program left behind, all of which is the keeper's now. A process namespace does that by itself."""
    while True:
        if os.geteuid() == 0 and not os.fork():
            try:
                os.setresuid(user, user, user)
                os.kill(-1, signal.SIGKILL)  # all of that user's at once, however fast they fork
            finally:
                os._exit(0)
        for pid in children_of(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def children_of(parent: int) -> list:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open("/proc/" + name + "/stat") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == parent:
                found.append(int(name))
    return found


def confine(config: dict, folder: str, ends: tuple) -> None:
    """The program's own process, made as small as it can be."""
    limits, (output, say) = config["limits"], ends
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    os.setsid()
    if config["confinement"] == "isolated":
        mount("none", WORK, "tmpfs", MS_NOSUID | MS_NODEV, "mode=777,nr_inodes=4096,size={}".format(limits["disk"]))
        if libc.mount(b"proc", b"/proc", b"proc", ctypes.c_ulong(MS_NOSUID | MS_NODEV), None) < 0:
            mount("none", "/proc", "tmpfs", MS_NOSUID | MS_NODEV, "size=4k")
    os.dup2(output, 1)
    os.dup2(output, 2)
    for end in range(3, 256):
        if end != say:
            with contextlib.suppress(OSError):
                os.close(end)
    place = folder or WORK
    os.environ.update(HOME=place, TMPDIR=place)
    bound(limits)
    give_up_privileges(folder, config["user"])
    os.chdir(place)
    prctl(SET_PDEATHSIG, signal.SIGKILL)  # here, as a change of user unsets it
    if config["calls"]:
        filter_calls(bytes.fromhex(config["calls"]))


def bound(limits: dict) -> None:
    for kind, limit in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["disk"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def give_up_privileges(folder: str, user: int) -> None:
    """Be a user that owns nothing where that can be chosen, and be able to gain nothing by any program."""
    if os.geteuid() == 0:
        for chosen in (user, NOBODY):  # which may be all that a container knows
            with contextlib.suppress(OSError):
                if folder:
                    os.chown(folder, chosen, chosen)
                os.setgroups([])
                os.setresgid(chosen, chosen, chosen)
                os.setresuid(chosen, chosen, chosen)
                break
    prctl(SET_NO_NEW_PRIVS, 1)
    nothing = struct.pack("IIIIII", 0, 0, 0, 0, 0, 0)
    check(libc.capset(struct.pack("Ii", 0x20080522, 0), nothing), "capset")


def filter_calls(steps: bytes) -> None:
    """Let the kernel refuse calls as `calls.py` says."""
    kept = ctypes.create_string_buffer(steps, len(steps))
    program = struct.pack("HxxxxxxP", len(steps) // 8, ctypes.addressof(kept))
    check(libc.prctl(SET_SECCOMP, ctypes.c_ulong(2), program, 0, 0), "seccomp")


def perform(parts: list, token: bytes, say: int) -> None:
    """Run a program's parts as the published tests do, in an empty module; say the token if all come to their end."""
    write, leave, flush, quiet = os.write, os._exit, sys.stdout.flush, contextlib.suppress(BaseException)
    # Nothing is looked up by name once a part has run: it may be another thing by then.
    compiled, run, anything, own, inside = compile, exec, BaseException, vars(builtins), builtins
    known, watchers, module = dict(own), (sys.settrace, sys.setprofile, threading.settrace), {}
    try:
        for part in parts:
            for name in [name for name in own if name not in known]:
                del own[name]
            own.update(known)
            module["__builtins__"] = inside
            for watch in watchers:
                watch(None)
            run(compiled(part, "<program>", "exec", 0, True), module)  # no future statement of this file
    except anything:
        traceback.print_exc()
        say, token = 2, b""
    with quiet:
        flush()
    write(say, token)
    leave(0 if token else 1)


def main() -> None:
    config = json.loads(sys.argv[1])
    config["user"] = FIRST_USER + os.getpid()
    answers = os.dup(1)
    broken = ""
    try:
        prctl(SET_PDEATHSIG, signal.SIGKILL)
        if config["confinement"] == "isolated":
            shut_in(config)
        for name in config["preload"]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    except OSError as error:
        broken = str(error)
    answer(answers, {"broken": broken})
    if not broken:
        serve(answers, config)


if __name__ == "__main__":
    main()
