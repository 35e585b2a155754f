"""Build hook of hatchling: what a wheel of this project holds."""

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HOOK = "_generative_platform_hook"
# An ordinary wheel carries the packages inside this folder of its own, because names like `callbacks` must not appear
# at the top of somebody's site-packages.
BUNDLE = "generative_platform_files"
PACKAGES = ("platform", "datamodules", "lightningmodules", "callbacks", "experiments")


class WheelHook(BuildHookInterface):
    """Installs the start-up hook, and in an ordinary wheel the packages too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add files to the wheel.

        Args:
            version: ``editable`` or ``standard``.
            build_data: hatchling's description of the wheel, changed in place.
        """
        root = Path(self.root)
        if version == "editable":
            # !a (ascii) because older Pythons read .pth files in the encoding of the locale
            start = f"import {HOOK}; {HOOK}.install({str(root / 'platform')!a})\n"
        else:
            beside = f"os.path.join(os.path.dirname(h.__file__), {f'{BUNDLE}/platform'!r})"
            start = f"import os, {HOOK} as h; h.install({beside})\n"
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # the wheel is written after this method returns
        line = folder / "start.pth"
        line.write_text(start, encoding="ascii")
        files = {str(line): f"{HOOK}.pth", str(root / "platform" / "_install" / "hook.py"): f"{HOOK}.py"}
        if version != "editable":
            files.update({str(root / package): f"{BUNDLE}/{package}" for package in PACKAGES})
        build_data["force_include_editable" if version == "editable" else "force_include"] = files
