"""Makes an editable installation a line in a .pth file, which names this folder; all else is in pyproject.toml.

trimask/__init__.py finds the rooms from there. setuptools by itself would install a finder, since most folders are not
where the names of their packages say. Python asks finders after `sys.path`, where any folder called trimask, such as a
clone in the working directory, would hide the package.
"""

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel


class EditableWheel(editable_wheel):
    """Knows of trimask/ alone, which lies where its name says."""

    def finalize_options(self) -> None:
        """Takes the rooms away before setuptools looks at the layout."""
        self.distribution.packages, self.distribution.package_dir = ["trimask"], {"": "."}
        super().finalize_options()


setup(cmdclass={"editable_wheel": EditableWheel})
