"What the process tests share: the project's root and its commands"
import os, signal, subprocess, sys
from pathlib import Path
import pytest
from flow2lab.files import project_root

@pytest.fixture(scope='session')
def root(): return project_root()

@pytest.fixture(scope='session')
def run(root):
    "Run a command of the environment under test from the project's root; returns the CompletedProcess"
    def _run(*cmd, timeout=600, env=None, cwd=root, **kw):
        exe = Path(sys.executable).parent/cmd[0]
        cmd = [str(exe if exe.exists() else cmd[0]), *map(str, cmd[1:])]
        p = subprocess.Popen(cmd, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             start_new_session=True,
                             env={**os.environ, **(env or {})}, **kw)
        try: out, err = p.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)     # with the kernels and workers it started
            raise
        return subprocess.CompletedProcess(cmd, p.returncode, out, err)
    return _run
