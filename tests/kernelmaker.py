"""Kernels for notebooks, forked by the server of teammaker: each is fresh, none imports torch and Transformers anew."""

import os

import pandas
from teammaker import CONTEXT


class Kernel:
    """A forked kernel, as Jupyter handles one: like a Popen."""

    stdin = stdout = stderr = None

    def __init__(self, arguments: list[str], env: dict, cwd: str):
        self.process = CONTEXT.Process(target=_serve, args=(arguments, env, cwd))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


async def fork_kernel(provisioner, command: list[str], *, env: dict, cwd: str, **_) -> dict:
    """In place of ``LocalProvisioner.launch_kernel``. It has no process group of its own that could be signalled."""
    provisioner.process = Kernel(command[command.index("-f") :], dict(env), str(cwd))
    provisioner.pid, provisioner.cwd = provisioner.process.pid, cwd
    return provisioner.connection_info


def _serve(arguments: list[str], env: dict, cwd: str) -> None:
    """The kernel's process: it ends when the server that forked it does."""
    os.environ.clear()
    os.environ.update(env | {"JPY_PARENT_PID": str(os.getppid())})
    os.chdir(cwd)
    pandas.set_option("display.max_columns", 20)  # as pandas has it when a kernel imports it
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=arguments)
