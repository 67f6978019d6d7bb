"What the process tests share: the project's root, its commands, and the real data where a machine has it"
import os, subprocess, sys
from pathlib import Path
import pytest
from flow2lab.core import project_root, setting

@pytest.fixture(scope='session')
def root(): return project_root()

@pytest.fixture(scope='session')
def run(root):
    "Run a command of the environment under test from the project's root; returns the CompletedProcess"
    def _run(*cmd, timeout=600, env=None, **kw):
        exe = Path(sys.executable).parent/cmd[0]
        return subprocess.run([str(exe if exe.exists() else cmd[0]), *map(str, cmd[1:])], cwd=kw.pop('cwd', root), text=True,
                              capture_output=True, timeout=timeout, env={**os.environ, **(env or {})}, **kw)
    return _run

@pytest.fixture(scope='session')
def real_data(root):
    "The folder with the real datasets: in FLOW2LAB_DATA, or shared/data beside the checkout"
    for d in [*map(Path, setting('data').split(os.pathsep)), root/'..'/'shared'/'data']:
        if (d/'gsm8k').is_dir(): return d.resolve()
    pytest.skip('real datasets not here: name their folder in FLOW2LAB_DATA')
