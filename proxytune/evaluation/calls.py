"""The system calls that a program in the sandbox is refused, as a filter for the kernel (seccomp, classic BPF).

They are what no limit counts and no namespace covers: memory of their own kinds (memfd_create, memfd_secret, shmget,
semget, msgget, mq_open), other processes (ptrace, process_vm_readv and _writev, pidfd_getfd, perf_event_open),
namespaces and mounts (unshare, setns, mount, pivot_root, open_tree, move_mount, fsopen, clone with their flags), the
kernel's keys (add_key, request_key, keyctl), and wide doors into the kernel (bpf, userfaultfd, io_uring_setup). Sockets
are those of files and of the internet alone: no namespace keeps a virtual machine's own (vsock) from its host.
"""

from __future__ import annotations

import platform
import struct

MACHINES = {  # its audit number, `clone`, `socket`, and the calls above in their order
    "x86_64": (
        *(0xC000003E, 56, 41),
        *(319, 447, 29, 64, 68, 240),
        *(101, 310, 311, 438, 298),
        *(272, 308, 165, 155, 428, 429, 430),
        *(248, 249, 250, 321, 323, 425),
    ),
    "aarch64": (
        *(0xC00000B7, 220, 198),
        *(279, 447, 194, 190, 186, 180),
        *(117, 270, 271, 438, 241),
        *(97, 268, 40, 41, 428, 429, 430),
        *(217, 218, 219, 280, 282, 425),
    ),
}
CLONE3, OTHER_ABI = 435, 0x40000000  # x86-64's second set of numbers begins here
NEW_NAMESPACES = 0x7E020080  # flags of clone
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
LOAD, EQUAL, AT_LEAST, ANY_OF, ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOWED, NOT_PERMITTED, NOT_THERE = 0x7FFF0000, 0x00050001, 0x00050026  # as the kernel codes EPERM and ENOSYS
MACHINE_AT, NUMBER_AT, FIRST_AT = 4, 0, 16  # bytes into what a filter sees of a call


def filtered() -> bytes | None:
    """The filter's steps, eight bytes each; None for a machine whose numbers are not listed here."""
    if platform.machine() not in MACHINES:
        return None
    machine, clone, socket, *refused = MACHINES[platform.machine()]
    no, yes = (ANSWER, 0, 0, NOT_PERMITTED), (ANSWER, 0, 0, ALLOWED)
    # (what is done, steps to skip where it holds, and where not, operand)
    steps = [(LOAD, 0, 0, MACHINE_AT), (EQUAL, 1, 0, machine), no]
    steps += [(LOAD, 0, 0, NUMBER_AT), (AT_LEAST, 0, 1, OTHER_ABI), no]
    for number in refused:
        steps += [(EQUAL, 0, 1, number), no]
    steps += [(EQUAL, 0, len(FAMILIES) + 3, socket), (LOAD, 0, 0, FIRST_AT)]
    steps += [(EQUAL, len(FAMILIES) - place, 0, family) for place, family in enumerate(FAMILIES)] + [no, yes]
    # The flags of clone3 lie in memory, where no filter looks: the C library takes clone where there is none.
    steps += [(EQUAL, 0, 1, CLONE3), (ANSWER, 0, 0, NOT_THERE)]
    steps += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, FIRST_AT), (ANY_OF, 0, 1, NEW_NAMESPACES), no, yes]
    return b"".join(struct.pack("HBBI", *step) for step in steps)
