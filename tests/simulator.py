"""Tests that need Numba's CUDA simulator run in a process of their own: there it takes the place of CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[1]
_TOLD = ("error", "failure", "skipped")


def outcomes(report: Path, *arguments: str) -> dict[str, str]:
    """What pytest, run with these arguments, said of each test: nothing where it passed, else why it did not.

    `report` is a file for it to write.
    """
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}")
    done = python(*pytest, *arguments, NUMBA_ENABLE_CUDASIM="1")
    assert report.exists(), f"the simulator's process ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return {
        case.attrib["name"]: "\n".join(
            f"{each.tag}: {each.text or each.get('message')}" for each in case if each.tag in _TOLD
        )
        for case in ET.parse(report).iter("testcase")
    }


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False
    )
