"""A rank other than 0: loads its part of the model and computes the steps that rank 0 sends, until rank 0 is gone."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from fastattn import config
from fastattn.engine.late_imports import TORCH_MODULES, LateImports

_PR_SET_PDEATHSIG = 1
# What rank 0 may take to leave after it closed its sockets, before its other ranks stop waiting for a computation.
_LEAVE_SECONDS = 1.0


def main(fd: str, parent: str) -> NoReturn:
    """The program of a rank that rank 0 started."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before that was in force
        sys.exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 decides when to end, a server drains first
        signal.signal(number, signal.SIG_IGN)
    LateImports(TORCH_MODULES).install()
    code = follow(socket.socket(fileno=int(fd)))
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)  # nothing else is left to tidy up, and a device that hangs would make it take for ever


def follow(sock: socket.socket) -> int:
    """Serves rank 0 at the other end. Returns the exit code: 0 if rank 0 has closed the group."""
    from fastattn.engine.rank_link import Board, Link, LinkClosedError, SharedMemory
    from fastattn.nn import CollectiveError

    link, ended = Link(sock), threading.Event()
    threading.Thread(target=_end_with_rank_0, args=(sock, ended), daemon=True).start()
    try:
        setup, (board_fd, store_fd) = link.receive_json(max_fds=2)
    except LinkClosedError:
        return 0
    board, rank = Board(SharedMemory(board_fd)), setup["rank"]
    try:
        _serve(link, board, store_fd, setup)
    except LinkClosedError:
        pass
    except BaseException as error:
        if config.log_level() == "DEBUG":
            traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({Path(last.filename).name}:{last.lineno})"
        board.fail(rank, f"{type(error).__name__}: {error}{place}", isinstance(error, CollectiveError))
        link.shut_down()  # rank 0 hears of it now; what this process's end waits for may take long
        return 1
    finally:
        ended.set()
    return 0


def _serve(link: Any, board: Any, store_fd: int, setup: dict[str, Any]) -> None:
    import torch

    from fastattn.engine.config import EngineConfig
    from fastattn.engine.device import choose_device, choose_dtype, device_memory
    from fastattn.engine.kv_scales import load_kv_scales
    from fastattn.engine.rank_link import LinkClosedError, SharedMemory, connect
    from fastattn.engine.runner import Runner
    from fastattn.models.loader import open_model
    from fastattn.models.loader.quantized_source import with_quantization
    from fastattn.models.registry import load_model
    from fastattn.speculative.config import SpeculativeConfig

    rank, size = setup["rank"], setup["size"]
    torch.set_num_threads(setup["num_threads"])
    device = choose_device(setup["device"].format(rank=rank))
    dtype = choose_dtype(setup["dtype"], device)
    free, total = device_memory(device)
    link.send_json(free=free, total=total)
    loading, (memory_fd,) = link.receive_json(max_fds=1)
    settings = loading["config"]
    if settings["speculative"] is not None:
        settings["speculative"] = SpeculativeConfig.from_dict(settings["speculative"])
    options = EngineConfig(**settings)
    tp = connect(store_fd, rank, size, device, lambda: board.begin(rank))
    try:
        source = with_quantization(open_model(setup["source"]), setup["quantization"])
        network = load_model(source, device, dtype, options.max_model_len, tp=tp)
        kv_scales = load_kv_scales(options.kv_cache_scales, options.kv_cache_dtype, source, tp)
        memory = SharedMemory(memory_fd).tensor(device)
        runner = Runner(network, options, device, dtype, step_memory=memory, kv_scales=kv_scales)
        link.send(b"loaded")
        while True:
            message, _ = link.receive()
            board.begin(rank)
            runner.follow(message)
            link.send(b"read")
    except LinkClosedError:
        if device.type == "cuda":
            tp.abort()  # as rank 0 does at this moment: one that is alone with it tries for long to reach the others
        raise


def _end_with_rank_0(sock: socket.socket, ended: threading.Event) -> None:
    """Ends this process when the socket's other end is closed, if it does not see so itself: it may be in an exchange that
    will never be answered."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    poll.poll()
    if not ended.wait(_LEAVE_SECONDS):
        os._exit(1)
