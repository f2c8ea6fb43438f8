"""Work for many processes, of which any may be killed."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

from mspt.errors import UserError


def unordered(function, tasks, processes):
    """Yield function(task) of every task, in the order in which they are done.

    function, tasks and results are pickled, the function once to each process. With one process the work is done in
    this one. tasks may be a generator: it is asked for one more only when a process is free for it, but one.
    Raises UserError where function does, or where a process has been killed; RuntimeError where it failed otherwise.
    """
    if processes == 1:
        yield from map(function, tasks)
        return
    workers = {}
    try:
        for task in tasks:
            if len(workers) < processes:
                connection, process = _start(function)
                workers[connection] = process
            else:
                connection = wait(workers)[0]
                yield _receive(connection, workers[connection])
            with contextlib.suppress(ConnectionError):  # of a process that has ended: what it leaves is received next
                connection.send(task)
        while workers:
            connection = wait(workers)[0]
            yield _receive(connection, workers[connection])
            connection.close()  # which tells the process that there is no more
            workers.pop(connection).join()
    finally:
        for process in workers.values():
            process.terminate()
        for connection, process in workers.items():
            process.join()
            connection.close()


def _start(function):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(function, theirs))
    # Ctrl-C reaches the whole group: it is for this process to end the others, which are started with it blocked. Who
    # starts the first of them unblocks it again, so that comes before.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    except BrokenPipeError:
        raise _ended("while it started") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    theirs.close()  # so that ours ends when the process does
    return ours, process


def _work(function, connection):
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = function(task), None
        except UserError as error:
            answer = None, error
        except Exception:
            answer = None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
        connection.send(answer)


def _end_with_parent():
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _receive(connection, process):
    try:
        result, error = connection.recv()
    except (EOFError, ConnectionError):
        process.join()
        code = process.exitcode
        raise _ended(f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}") from None
    if error is not None:
        raise error
    return result


def _ended(how):
    return UserError(
        f"a worker process was ended {how}, as a machine does that is out of memory; "
        "give the same command again to go on, with fewer --processes if it was that"
    )
