"""The Slurm script and the KubeRay manifest of docs/cluster say what rlsys understands."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlsys.cli import build_parser

FILES = Path(__file__).parents[2] / "docs" / "cluster"
STANDIN = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $1" in
  "rlsys token") echo rlsys1.token ;;
  "rlsys up") sleep 0.5; exit 3 ;;
  "srun "*) cat >> "$CALLS" ;;
esac
"""


def test_the_slurm_script_starts_the_run_here_and_lets_the_other_nodes_join(tmp_path: Path) -> None:
    for name in ("rlsys", "srun"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STANDIN)
        path.chmod(0o755)
    calls, run = tmp_path / "calls", tmp_path / "runs" / "one"
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "CONFIG": "c.yaml", "RUN": str(run),
        "SLURM_NNODES": "3", "SLURM_GPUS_PER_NODE": "h100:2", "SLURM_CPUS_PER_TASK": "16", "SLURMD_NODENAME": "n1",
    }  # fmt: skip
    done = subprocess.run(["bash", str(FILES / "slurm.sbatch")], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 3, f"the run's own exit code: {done.stderr}"
    lines = calls.read_text().splitlines()
    [up] = [line for line in lines if line.startswith("rlsys up")]
    options = build_parser().parse_args(shlex.split(up)[1:])
    assert (options.config, options.run_dir, options.resume) == (Path("c.yaml"), run, None)
    assert "transport.kind=tcp" in options.overrides and f"weights.directory={tmp_path / 'runs' / 'weights'}" in options.overrides
    [srun] = [line for line in lines if line.startswith("srun") and "rlsys join" in line]
    assert {"--nodes=2", "--ntasks=2", "--cpus-per-task=16", "--exclude=n1"} <= set(srun.split())
    joined = build_parser().parse_args(shlex.split(srun[srun.index("rlsys join") :])[1:])
    assert (joined.token, joined.role, joined.count, joined.devices) == ("-", "generator", 2, "")
    assert "rlsys1.token" in lines, "the token goes over standard input"

    run.mkdir(parents=True)
    (run / "ledger.sqlite").touch()
    subprocess.run(["bash", str(FILES / "slurm.sbatch")], env=environment, capture_output=True, timeout=600, check=False)
    assert any(line.startswith(f"rlsys up --resume {run}") for line in calls.read_text().splitlines()), "submitted again it goes on"


def test_the_manifests_entry_point_is_a_command(tmp_path: Path) -> None:
    manifest: dict[str, Any] = yaml.safe_load((FILES / "kuberay.yaml").read_text())
    options = build_parser().parse_args(shlex.split(manifest["spec"]["entrypoint"])[1:])
    assert (options.launcher, options.address) == ("ray", "auto")
    cluster = manifest["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for pod in pods for container in pod["template"]["spec"]["containers"]}
    assert len(images) == 1, "one image, and so one version of rlsys"
    for pod in pods:
        spec = pod["template"]["spec"]
        mounts = {mount["name"]: mount["mountPath"] for container in spec["containers"] for mount in container["volumeMounts"]}
        assert mounts["shared"] == "/shared" and mounts.keys() == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD names KubeRay's ray.io_rayjobs.yaml")
def test_the_manifest_follows_kuberays_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    definition = yaml.safe_load(Path(os.environ["KUBERAY_CRD"]).read_text())
    [version] = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    manifest = yaml.safe_load((FILES / "kuberay.yaml").read_text())
    jsonschema.validate(manifest, schema)
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["grupName"] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schema)


def strict(schema: Any) -> Any:
    """As the API server reads it: no unknown fields, and numbers as text where either may stand."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    found = {key: strict(value) for key, value in schema.items()}
    open_ended = "additionalProperties" in found or found.get("x-kubernetes-preserve-unknown-fields")
    if found.get("type") == "object" and isinstance(found.get("properties"), dict) and not open_ended:
        found["additionalProperties"] = False
    return found
