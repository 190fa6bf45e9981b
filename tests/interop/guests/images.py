"""What guests are made of, fetched as Debian packages and unpacked into a cache; nothing is installed.

`python -m tests.interop.guests.images FOLDER` puts the files that the commands of docs/attach.md need into FOLDER.

The cache is ~/.cache/vnetdp/guests, or $VNETDP_GUEST. Packages come from the Debian mirror that apt is configured with,
from its backports, and for the newest QEMU from its unstable release. A part is made once; delete its folder, or change this
file, to have it made again.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TOOLS = ("iperf3", "ethtool")  # of this machine, put into the guest with their libraries
MODULES = (
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
)
_FETCH_S = 300
_OLD_QEMU = 8  # before it, TCG with vhost-user crashes on MSI-X, and migration under TCG corrupts guest memory


class MissingError(Exception):
    """A guest can't be made here; the text says what is missing."""


def cache_dir() -> Path:
    named = os.environ.get("VNETDP_GUEST")
    return Path(named) if named else Path.home() / ".cache" / "vnetdp" / "guests"


@dataclass(frozen=True)
class Qemu:
    """An emulator, and what it needs to run from where it was unpacked."""

    binary: Path
    environment: dict[str, str]
    arguments: tuple[str, ...]


# --- packages ---


def _run(*argv: str | Path, cwd: Path | None = None, timeout: float = _FETCH_S) -> str:
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=True)
    except FileNotFoundError as e:
        raise MissingError(f"{e.filename} is not installed") from e
    except subprocess.TimeoutExpired as e:
        raise MissingError(f"{argv[0]} took more than {timeout:.0f} s") from e
    except subprocess.CalledProcessError as e:
        said = (e.stderr or e.stdout).strip().splitlines()
        raise MissingError(f"{' '.join(map(str, argv[:3]))} ... failed: {said[-1] if said else e.returncode}") from e
    return done.stdout


class Packages:
    """Debian packages from *sources* (lines of a sources.list), under lists of our own.

    bare: as if nothing were installed here, so that what a package needs comes with it.
    """

    def __init__(self, folder: Path, sources: str, bare: bool = False) -> None:
        for part in ("lists/partial", "cache/archives/partial", "debs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._options = [
            *("-o", f"Dir::Etc::SourceList={folder / 'sources.list'}", "-o", "Dir::Etc::SourceParts=/dev/null"),
            *("-o", f"Dir::State::lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"),
        ]
        if bare:
            (folder / "status").touch()
            self._options += ["-o", f"Dir::State::status={folder / 'status'}"]
        (folder / "sources.list").write_text(sources)
        _run("apt-get", "-q", *self._options, "update")

    def latest(self, meta: str) -> str:
        """Return the first package that *meta* depends on: what a kernel's meta package stands for."""
        found = re.search(r"Depends: (\S+)", _run("apt-cache", *self._options, "depends", meta))
        if not found:
            raise MissingError(f"no package {meta}")
        return found[1]

    def unpack(self, names: Sequence[str], into: Path) -> None:
        """Fetch packages (`name`, `name=version` or `name/suite`) and unpack them."""
        debs = self._folder / "debs"
        before = set(debs.iterdir())
        _run("apt-get", "-q", *self._options, "download", *names, cwd=debs)
        new = set(debs.iterdir()) - before
        for name in names:
            stem = re.split("[=/]", name)[0]
            for deb in [path for path in new if path.name.startswith(f"{stem}_")]:
                _run("dpkg", "-x", deb, into)
                deb.unlink()

    def with_dependencies(self, name: str, suite: str) -> list[str]:
        """Return *name* from *suite* and what it needs that this machine has not, as `name=version`."""
        asked = _run("apt-get", *self._options, "-s", "--no-install-recommends", "-t", suite, "install", name)
        found = re.findall(r"^Inst (\S+) (?:\[\S+\] )?\((\S+)", asked, re.MULTILINE)
        return [f"{package}={version}" for package, version in found]


def _os_release() -> dict[str, str]:
    path = Path("/etc/os-release")
    lines = path.read_text().splitlines() if path.exists() else []
    return {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}


def _mirror() -> tuple[str, list[tuple[str, str]]]:
    """Return the code name of this machine's release, and where apt has it from: sites and suites, the main one first."""
    release = _os_release()
    if release.get("ID") != "debian" or not KEYRING.exists():
        raise MissingError("guests are made from Debian's packages, and this is not Debian")
    codename = release["VERSION_CODENAME"]
    lines = _run("apt-get", "indextargets", "--format", "$(SITE)|$(RELEASE)|$(COMPONENT)").splitlines()
    targets = {tuple(line.split("|")) for line in lines}
    own = [
        (site, suite) for site, suite, component in targets if suite.split("-")[0] == codename and component == "main"
    ]
    if not any(suite == codename for _, suite in own):
        raise MissingError(f"apt has no source for {codename}")
    return codename, sorted(own, key=lambda pair: (pair[1] != codename, pair))


def _sources(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"deb [signed-by={KEYRING}] {site} {suite} main\n" for site, suite in pairs)


@functools.cache
def _packages() -> Packages:
    """The packages of this machine's Debian release, with security and backports."""
    codename, own = _mirror()
    return Packages(cache_dir() / "apt", _sources([*own, (own[0][0], f"{codename}-backports")]))


@functools.cache
def _unstable() -> Packages:
    """The packages of Debian's unstable release. They need libraries of its own, the loader too."""
    _, own = _mirror()
    return Packages(cache_dir() / "apt-sid", _sources([(own[0][0], "sid")]), bare=True)


@contextmanager
def _made_once(name: str, *depends_on: str) -> Iterator[Path | None]:
    """Give the folder to make part *name* in, or None if it is there; it counts as made only if the block ends well."""
    stamp = hashlib.sha256(Path(__file__).read_bytes() + "".join(depends_on).encode()).hexdigest()
    folder = cache_dir() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (cache_dir() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / ".made"
        if made.exists() and made.read_text() == stamp:
            yield None
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        made.write_text(stamp)


# --- the parts ---


@functools.cache
def qemu() -> Qemu:
    """Return a QEMU that runs vhost-user guests under TCG: this machine's if it is new enough, else backports'."""
    own = shutil.which("qemu-system-x86_64")
    if own and _version(Qemu(Path(own), {}, ())) >= _OLD_QEMU:
        return Qemu(Path(own), {}, ())
    root = cache_dir() / "qemu"
    with _made_once("qemu") as folder:
        if folder is not None:
            packages = _packages()
            packages.unpack(packages.with_dependencies("qemu-system-x86", f"{_mirror()[0]}-backports"), folder)
    libraries = ":".join(str(root / part) for part in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"))
    found = Qemu(root / "usr/bin/qemu-system-x86_64", {"LD_LIBRARY_PATH": libraries}, _data(root))
    if _version(found) < _OLD_QEMU:
        raise MissingError("no QEMU 8 or newer, neither installed nor in backports")
    return found


@functools.cache
def newest_qemu() -> Qemu:
    """Return the QEMU of Debian's unstable release, with every library that it needs: it has devices that 10 has not."""
    root = cache_dir() / "qemu-sid"
    with _made_once("qemu-sid") as folder:
        if folder is not None:
            packages = _unstable()
            packages.unpack(packages.with_dependencies("qemu-system-x86", "sid"), folder)
    libraries, program = root / "usr/lib/x86_64-linux-gnu", root / "usr/bin/qemu-system-x86_64"
    loader = libraries / "ld-linux-x86-64.so.2"
    return Qemu(loader, {}, ("--library-path", str(libraries), str(program), *_data(root)))


def _data(root: Path) -> tuple[str, ...]:
    """Return the arguments that name the firmware of an unpacked QEMU."""
    return tuple(word for part in ("qemu", "seabios") for word in ("-L", str(root / "usr/share" / part)))


def _version(emulator: Qemu) -> int:
    environment = {**os.environ, **emulator.environment}
    argv = [str(emulator.binary), *emulator.arguments, "--version"]
    said = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"version (\d+)", said.stdout)
    return int(found[1]) if found else 0


@dataclass(frozen=True)
class Image:
    """A kernel, and the archive that it starts from."""

    kernel: Path
    initrd: Path


@functools.cache
def pc() -> Image:
    """Return Debian's cloud kernel for a PC, and its initramfs."""
    root = cache_dir() / "pc"
    with _made_once("pc", *_inputs()) as folder:
        if folder is not None:
            packages = _packages()
            name = packages.latest("linux-image-cloud-amd64")
            packages.unpack([name], folder / "unpacked")
            version = name.removeprefix("linux-image-")
            shutil.copy(folder / "unpacked/boot" / f"vmlinuz-{version}", folder / "vmlinuz")
            modules = _find(folder / "unpacked", "modules") / version
            _initramfs(folder, modules, version)
            shutil.rmtree(folder / "unpacked")
    return Image(root / "vmlinuz", root / "initrd")


@functools.cache
def uml() -> Image:
    """Return User Mode Linux, and its initramfs."""
    root = cache_dir() / "uml"
    with _made_once("uml", *_inputs()) as folder:
        if folder is not None:
            _packages().unpack(["user-mode-linux"], folder / "unpacked")
            shutil.copy(folder / "unpacked/usr/bin/linux.uml", folder / "linux")
            (modules,) = (folder / "unpacked/usr/lib/uml/modules").iterdir()
            _initramfs(folder, modules, modules.name)
            shutil.rmtree(folder / "unpacked")
    return Image(root / "linux", root / "initrd")


def _find(root: Path, name: str) -> Path:
    found = [path for path in (root / "lib" / name, root / "usr/lib" / name) if path.exists()]
    if not found:
        raise MissingError(f"no {name} in the kernel's package")
    return found[0]


def _inputs() -> list[str]:
    return [(HERE / name).read_text() for name in ("init", "probe.c")]


def _initramfs(folder: Path, modules: Path, version: str) -> None:
    """Make *folder*/initrd: BusyBox, the tools, the probe, virtio's modules, and our init."""
    root = folder / "root"
    for part in ("bin", "sbin", "proc", "sys", "dev", "tmp", "etc", "usr/bin", "lib64", "lib/x86_64-linux-gnu", "run"):
        (root / part).mkdir(parents=True)
    busybox = folder / "unpacked/bin/busybox"
    if not busybox.exists():
        _packages().unpack(["busybox-static"], folder / "unpacked")
        busybox = next(path for path in folder.glob("unpacked/**/bin/busybox") if path.is_file())
    shutil.copy(busybox, root / "bin/busybox")
    for applet in _run(busybox, "--list").split():
        link = root / "bin" / applet
        if not link.exists():
            link.symlink_to("busybox")
    into = root / "lib/modules" / version
    into.mkdir(parents=True)
    for name in MODULES:
        for path in modules.glob(f"**/{name}.ko*"):
            plain = into / f"{name}.ko"
            if path.suffix == ".xz":
                _run("sh", "-c", f"xz -dc '{path}' > '{plain}'")
            else:
                shutil.copy(path, plain)
    _run(busybox, "depmod", "-b", root, version)
    for tool in TOOLS:
        program = shutil.which(tool)
        if program is None:
            raise MissingError(f"{tool} is not installed")
        _with_libraries(Path(program), root)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise MissingError("there is no C compiler (cc)")
    _run(compiler, "-O2", "-Wall", "-static", "-s", "-o", root / "usr/bin/probe", HERE / "probe.c")
    shutil.copy(HERE / "init", root / "init")
    (root / "init").chmod(0o755)
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    _run("sh", "-c", "find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 > ../initrd", cwd=root)
    shutil.rmtree(root)


def _with_libraries(program: Path, root: Path) -> None:
    shutil.copy(program, root / "usr/bin" / program.name)
    for library in sorted(set(re.findall(r"/\S+\.so\S*", _run("ldd", program)))):
        place = "lib64" if "/ld-linux" in library else "lib/x86_64-linux-gnu"
        shutil.copy(library, root / place)


def put_into(folder: Path) -> None:
    """Put the files that the documents name into *folder*: kernels, initial file systems, and a QEMU to run here."""
    folder.mkdir(parents=True, exist_ok=True)
    emulator = qemu()
    for name, target in (
        *(("vmlinuz", pc().kernel), ("initrd", pc().initrd)),
        *(("linux.uml", uml().kernel), ("initrd-uml", uml().initrd)),
    ):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
    environment = " ".join(f"{name}={value}" for name, value in emulator.environment.items())
    program = folder / "qemu-system-x86_64"
    # The card's boot ROM is in a package that is not fetched.
    program.write_text(
        f"#!/bin/sh\n{environment} exec {emulator.binary} {' '.join(emulator.arguments)} "
        '-global virtio-net-pci.romfile= "$@"\n'
    )
    program.chmod(0o755)


if __name__ == "__main__":
    try:
        put_into(Path(sys.argv[1]))
    except MissingError as e:
        sys.exit(f"no guests: {e}")
