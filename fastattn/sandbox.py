"""Programs that came with a model or a request, run in a process of their own that may be killed: no secrets, bounded time
and memory. What goes in and out is JSON, a line each."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

# Beside the CPU time that a task may take: a machine that is too busy to give it that much ends it too.
WALL_SECONDS_PER_CPU_SECOND = 10


class SandboxError(ValueError):
    """The task failed, in its own words or because it took too much."""


class Sandbox:
    """Runs ``python -m module`` when first needed, and anew after it died. One task at a time; any thread may call.

    cpu_seconds: of each task. memory_bytes: on top of what the process has when it is ready. The module ends with
    ``serve(handle)``.
    """

    def __init__(self, module: str, cpu_seconds: float, memory_bytes: int) -> None:
        self._module, self._cpu_seconds, self._memory_bytes = module, cpu_seconds, memory_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def run(self, task: Any) -> Any:
        """The handler's answer. Raises SandboxError."""
        line = json.dumps(task)  # before the lock: what is no JSON concerns the caller alone
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            timer = threading.Timer(self._cpu_seconds * WALL_SECONDS_PER_CPU_SECOND, process.kill)
            timer.start()
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:  # it died while it was written to
                answer = ""
            finally:
                timer.cancel()
            if not answer:
                raise SandboxError(self._why_it_died(process))
        reply = json.loads(answer)
        if "error" in reply:
            raise SandboxError(reply["error"])
        return reply["result"]

    def close(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()
                self._process = None

    def _start(self) -> subprocess.Popen[str]:
        # Its environment is empty but for where modules are: keys and tokens of this process are not its business.
        return subprocess.Popen(
            [sys.executable, "-m", self._module, str(self._cpu_seconds), str(self._memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"},
            encoding="utf-8",
            start_new_session=True,  # a Ctrl-C in the terminal is for the server to handle
        )

    def _why_it_died(self, process: subprocess.Popen[str]) -> str:
        process.kill()
        process.communicate()
        self._process = None
        code = process.returncode
        if code in (-signal.SIGPROF, -signal.SIGKILL):
            return f"it took more than {self._cpu_seconds:g} s of CPU time"
        if code == -signal.SIGSEGV:
            return "it is nested too deeply"
        return f"it took more than {self._memory_bytes >> 20} MiB of memory, or ended the process ({code})"


def serve(handle: Callable[[Any], Any]) -> None:
    """The main program of a sandbox: answers tasks until its input ends.

    A ValueError's message goes to the caller; so does the type of what else was raised, and a lack of memory.
    """
    cpu_seconds, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes no file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        # Counts this process's CPU time, and ends it also inside native code: SIGPROF's default is to kill.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            reply = {"result": handle(json.loads(line))}
        except ValueError as error:
            reply = {"error": str(error)}
        except MemoryError:
            reply = {"error": f"it took more than {memory_bytes >> 20} MiB of memory"}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
