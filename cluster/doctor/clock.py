"""Clocks: how far those of other machines are from this one's. Logs and metrics of several are laid together."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.doctor.finding import Finding, error, ok, warning

CHECK = "clock"
NOTICEABLE_SECONDS = 0.5
WRONG_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockOffset:
    """How far the clock of `machine` is ahead of this one's, give or take `uncertainty`: half the way there
    and back."""

    machine: str
    seconds: float
    uncertainty: float = 0.0


def offset_of(machine: str, sent: float, told: float, received: float) -> ClockOffset:
    """From one question: when it was sent and answered by our clock (Unix seconds), and the time the answer told."""
    return ClockOffset(machine=machine, seconds=told - (sent + received) / 2, uncertainty=(received - sent) / 2)


def judge_clocks(offsets: Sequence[ClockOffset]) -> list[Finding]:
    """One for each clock that is off for sure, else one for all."""
    findings = []
    for offset in offsets:
        least = max(0.0, abs(offset.seconds) - offset.uncertainty)
        if least < NOTICEABLE_SECONDS:
            continue
        found = f"Its clock is {abs(offset.seconds):.1f} s {'ahead' if offset.seconds > 0 else 'behind'}."
        remedy = (
            "Synchronise both machines: `timedatectl set-ntp true`, or chrony (`chronyc tracking` says how it goes)."
        )
        level = error if least >= WRONG_SECONDS else warning
        findings.append(level(CHECK, found, offset.machine, remedy))
    if findings or not offsets:
        return findings
    machines = "one other machine" if len(offsets) == 1 else f"{len(offsets)} other machines"
    return [
        ok(CHECK, f"Equal to that of {machines}, as far as can be seen.", ", ".join(each.machine for each in offsets))
    ]
