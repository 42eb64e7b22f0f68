"""`DeviceSpec`: what a device could do at best; the data sheets of those that people plan for without having them.

Conventions, which are NanoFlow's (arXiv 2408.12757, table 1): dense rates without sparsity, decimal gigabytes, and the
network of one device in one direction (its table prints both directions together). 32-bit products are those that
PyTorch does by default, not TF32; 8-bit ones are of FP8, and a device without them has no such rate. Torch-free.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.number_format import NumberFormat
from engine.pipeline.unit_sharing import PAPER_SHARING, UnitSharing

CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """Bytes, bytes per second, floating-point operations per second.

    `flops_per_second` is by the bytes of an element: 1 for FP8, 2 for float16 and bfloat16, 4, 8. What one device sends
    per second is `network_bandwidth`, None where nothing is known. `sharing` is None where operations do not divide the
    units. `source` says where the figures are from, for people.
    """

    name: str
    source: str
    memory_bytes: float
    memory_bandwidth: float
    flops_per_second: Mapping[int, float]
    network_bandwidth: float | None
    num_units: int
    sharing: UnitSharing | None

    @property
    def has_fp8(self) -> bool:
        """Whether it multiplies numbers in FP8."""
        return NumberFormat.FP8.num_bytes in self.flops_per_second

    def compute_seconds(self, flops: float, element_bytes: int, fp8_flops: float = 0.0) -> float:
        """Time of so many operations on numbers of `element_bytes`, of which `fp8_flops` are on numbers in FP8.

        Raises `ConfigError` for an unknown width.
        """
        seconds = (flops - fp8_flops) / self._rate(element_bytes)
        return seconds + fp8_flops / self._rate(NumberFormat.FP8.num_bytes) if fp8_flops else seconds

    def _rate(self, element_bytes: int) -> float:
        if element_bytes not in self.flops_per_second:
            known = ", ".join(f"{8 * width}" for width in self.flops_per_second)
            raise ConfigError(f"{self.name}: no rate is known for {8 * element_bytes}-bit numbers, only for {known}.")
        return self.flops_per_second[element_bytes]

    def memory_seconds(self, num_bytes: float) -> float:
        """Time to move so many bytes to or from the device's memory."""
        return num_bytes / self.memory_bandwidth

    def network_seconds(self, num_bytes: float) -> float:
        """Time in which the device sends so many bytes; raises `ConfigError` where its network is not known."""
        if num_bytes == 0:
            return 0.0
        if self.network_bandwidth is None:
            raise ConfigError(
                f"{self.name}: nothing is known of the network between devices. Measure it (nanoserve profile), or "
                "plan for one device."
            )
        return num_bytes / self.network_bandwidth


def data_sheet(name: str) -> DeviceSpec:
    """The device called `name`; raises `ConfigError` that lists the known ones."""
    if name not in DATA_SHEETS:
        known = ", ".join((*DATA_SHEETS, CPU))
        raise ConfigError(f"No device is called {name!r}; there are {known} (this machine's, measured).")
    return DATA_SHEETS[name]


def _sheet(
    name: str,
    *,
    gigabytes: float,
    gigabytes_per_second: float,
    teraflops: tuple[float, float, float],
    network: float,
    num_units: int,
    fp8: float | None = None,
) -> DeviceSpec:
    """`teraflops` are those of 16, 32 and 64-bit numbers, `fp8` those of FP8; `network` is in gigabytes per second, one
    way.
    """
    rates = {width: rate * 1e12 for width, rate in zip((2, 4, 8), teraflops, strict=True)}
    return DeviceSpec(
        name=name,
        source="data sheet",
        memory_bytes=gigabytes * 1e9,
        memory_bandwidth=gigabytes_per_second * 1e9,
        flops_per_second=rates if fp8 is None else {NumberFormat.FP8.num_bytes: fp8 * 1e12, **rates},
        network_bandwidth=network * 1e9,
        num_units=num_units,
        sharing=PAPER_SHARING,
    )


# NVLink is per device and direction; the L40S has PCIe 4.0 x16; an MI300X has 64 GB/s to each of seven others.
DATA_SHEETS: Mapping[str, DeviceSpec] = {
    spec.name: spec
    for spec in (
        _sheet(
            "a100-40gb",
            gigabytes=40,
            gigabytes_per_second=1555,
            teraflops=(312, 19.5, 19.5),
            network=300,
            num_units=108,
        ),
        _sheet(
            "a100-80gb",
            gigabytes=80,
            gigabytes_per_second=2000,
            teraflops=(312, 19.5, 19.5),
            network=300,
            num_units=108,
        ),
        _sheet(
            "h100",
            gigabytes=80,
            gigabytes_per_second=3352,
            teraflops=(989, 67, 67),
            network=450,
            num_units=132,
            fp8=1979,
        ),
        _sheet(
            "h200",
            gigabytes=141,
            gigabytes_per_second=4800,
            teraflops=(989, 67, 67),
            network=450,
            num_units=132,
            fp8=1979,
        ),
        _sheet(
            "b200",
            gigabytes=180,
            gigabytes_per_second=8000,
            teraflops=(2250, 75, 37),
            network=900,
            num_units=148,
            fp8=4500,
        ),
        _sheet(
            "mi300x",
            gigabytes=192,
            gigabytes_per_second=5300,
            teraflops=(1307, 163.4, 163.4),
            network=448,
            num_units=304,
            fp8=2615,
        ),
        _sheet(
            "l40s",
            gigabytes=48,
            gigabytes_per_second=864,
            teraflops=(362, 91.6, 1.4),
            network=32,
            num_units=142,
            fp8=733,
        ),
    )
}
