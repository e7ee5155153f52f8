"""Opening a Bundle of forecasts, and forecasting with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import nn

from foveal.core.bundle import BundleFiles
from foveal.core.errors import DataError
from foveal.core.families.motion import Motion
from foveal.core.schema import OtherManifest, Positive
from foveal.data.tracks import UNEVEN, Tracks, open_tracks
from foveal.features.foresee import foresee
from foveal.ship.opened import Opened, must_fit, must_hold


class ForecastManifest(OtherManifest):
    """bundle.json of a network of forecasts."""

    dt: Positive
    maps: bool
    history: Annotated[int, Field(ge=1)]
    future: Annotated[int, Field(ge=1)]


def open_forecast(files: BundleFiles) -> ForecastBundle:
    """
    Raises:
        BundleError: bundle.json lacks what a network of forecasts needs.
    """
    must_hold(files, "bundle.json", files.manifest, ForecastManifest)
    return ForecastBundle(files)


@dataclass(frozen=True)
class ForecastBundle(Opened):
    """A network that forecasts where agents go. `predict` answers for tables of tracks."""

    @cached_property
    def method(self) -> Motion:
        return self.made_by(Motion, "forecasts no motion")

    @cached_property
    @torch.inference_mode(False)
    def model(self) -> nn.Module:
        """The torch network; see `Motion.attach`."""
        with must_fit(self.path):
            model = self.method.finish(self.method.attach(self.manifest["maps"], 1.0))
            model.load_state_dict(load_file(self.path / "model.safetensors"))
            return model.eval()

    def predict(
        self,
        tracks: str | Path | Sequence[str | Path],
        *,
        device: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Forecast each agent of tables of tracks from its last row (from its last one with a map, when the network
        reads maps).

        Returns:
            One row per agent: agent, time (of the last observed step), times (of the forecast steps), trajectory (the
            most likely one: [x, y] at each time, in the table's unit), modes (probability and trajectory of each
            possible future, the most likely first; not calibrated). An agent that cannot be forecast has no modes and
            says why under `error`.

        Raises:
            DataError: not a table of tracks, steps of another length than in training, or no map where one is needed.
        """
        tables = [tracks] if isinstance(tracks, str | Path) else list(tracks)
        return [row for table in tables for row in self.forecast(open_tracks(table), device, progress)]

    def forecast(
        self, tracks: Tracks, device: str, progress: Callable[[int, int], None] | None
    ) -> list[dict[str, Any]]:
        history, future = self.method.window()
        dt = self.manifest["dt"]
        if abs(tracks.dt - dt) > UNEVEN * dt:
            raise DataError(
                f"{tracks.name} has a row every {tracks.dt:g} s, this network learned from one every {dt:g} s: resample"
            )
        if self.manifest["maps"] and tracks.maps is None:
            raise DataError(f"{tracks.name} has no column map, and this network reads maps: add it")
        seen = tracks if self.manifest["maps"] else tracks.without_maps()
        row = np.arange(len(seen))
        first = np.searchsorted(seen.agent, np.arange(len(seen.agents)))
        usable = row - first[seen.agent] >= history
        if seen.maps is not None:
            usable &= seen.map_of >= 0
        last = np.full(len(seen.agents), -1)
        last[seen.agent[usable]] = row[usable]
        able = np.flatnonzero(last >= 0)
        modes, weights = foresee(self.method, self.model, seen, last[able], device=device, progress=progress)
        answers = {int(agent): place for place, agent in enumerate(able)}
        needed = f"{history + 1} steps" + (" up to a row with a map" if self.manifest["maps"] else "")
        rows: list[dict[str, Any]] = []
        for agent, name in enumerate(seen.agents):
            if agent not in answers:
                rows.append({"agent": name, "modes": [], "error": f"expected {needed}"})
                continue
            at = answers[agent]
            start = float(seen.time[last[agent]])
            found = [
                {"probability": round(float(sure), 4), "trajectory": mode.round(4).tolist()}
                for mode, sure in zip(modes[at], weights[at], strict=True)
            ]
            rows.append(
                {
                    "agent": name,
                    "time": start,
                    "times": [round(start + step * dt, 6) for step in range(1, future + 1)],
                    "trajectory": found[0]["trajectory"],
                    "modes": found,
                }
            )
        return rows

    def say(self, rows: list[dict[str, Any]]) -> str:
        """Rows of `predict`, a line per agent for people."""
        return "\n".join(
            f"{row['agent']}  cannot be forecast: {row['error']}"
            if "error" in row
            else f"{row['agent']}  at {row['times'][-1]:g} s: "
            f"{row['trajectory'][-1][0]:.2f},{row['trajectory'][-1][1]:.2f} ({row['modes'][0]['probability']:.2f})"
            for row in rows
        )

    def to_text(self) -> str:
        found, straight = self.metrics, self.metrics["references"]["straight on"]
        said = ", ".join(
            f"{key.upper()} {found[key]['value']:.3f} [{found[key]['low']:.3f}, {found[key]['high']:.3f}]"
            for key in ("ade", "fde")
        )
        return (
            f"{self.manifest['method']['name']}: {found['steps']} steps of {found['dt']:g} s\n"
            f"{found['split']}, {found['n']} forecasts of {found['agents']} agents: {said} "
            f"(straight on: FDE {straight['fde']['value']:.3f})\n{self.path}/report.html"
        )
