"""Programs without their start: a process that has imported torch, and forks for each command that it is asked for.

``python warm.py SOCKET`` listens. A client sends its standard streams, and its arguments and folder as JSON; the
answer is the exit code. ``CLIENT`` is that client, a ``whatwhere`` for a folder on the PATH.
"""

import json
import os
import signal
import socket
import sys
import traceback

CLIENT = """#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [json.dumps([sys.argv[1:], os.getcwd()]).encode()], [0, 1, 2])
    sys.exit(int(server.recv(8) or 70))
"""


def serve(address: str) -> None:
    """Answer until killed."""
    import timm  # noqa: F401
    import torch

    import whatwhere.apps.measuring
    import whatwhere.explanation  # noqa: F401
    from whatwhere.apps.cli import main

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    while True:
        asked, _ = listening.accept()
        told, streams, _, _ = socket.recv_fds(asked, 1 << 16, 3)
        if os.fork() == 0:
            break
        for stream in streams:
            os.close(stream)
        asked.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    arguments, folder = json.loads(told)
    os.chdir(folder)
    sys.argv = ["whatwhere", *arguments]
    code = 1
    try:
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        asked.sendall(str(code).encode())
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
