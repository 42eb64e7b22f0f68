"""What can be checked of images and manifests without the engines that run them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster import app
from cluster.config import ServingConfig
from cluster.ray_environment import serving_environment

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


class _ComposeLoader(yaml.SafeLoader):
    """Compose's own tag says that what a file below gave is taken back."""


_ComposeLoader.add_constructor("!reset", lambda loader, node: [])


def _compose(name: str) -> Any:
    return yaml.load((DEPLOY / name).read_text(), Loader=_ComposeLoader)


@pytest.fixture(scope="module")
def service() -> Any:
    """The RayService's spec."""
    manifest = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    return manifest["spec"]


def _containers(service: Any) -> list[Any]:
    cluster = service["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_serve_takes_the_application(service: Any) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    (application,) = config.applications
    assert application.name == app.APPLICATION and application.import_path == "cluster.app:build"
    assert app.build.__module__ == "cluster.app"
    values = dict(application.args)
    recipe = DEPLOY / Path(values.pop("recipe")).relative_to("/nanoserve/deploy")
    serving = ServingConfig.load(recipe, values)
    (worker,) = service["rayClusterConfig"]["workerGroupSpecs"]
    gpus = int(worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert serving.tensor_parallel <= gpus, "a replica's ranks are on one node"
    assert config.http_options.port == serving.port


def test_every_node_has_the_environment_that_serving_wants_and_the_token(service: Any) -> None:
    for container in _containers(service):
        given = {variable["name"]: variable for variable in container["env"]}
        for name, value in serving_environment().items():
            assert given[name]["value"] == value, f"{name} as in cluster/ray_environment.py"
        assert given["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in given["RAY_AUTH_TOKEN"]["valueFrom"]


def test_pods_run_the_haproxy_that_the_image_makes(service: Any, tmp_path: Path) -> None:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
    (program,) = re.findall(r'^RUN python -c "(.*)"$', text, re.MULTILINE)
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"HOME": str(tmp_path)}, check=True)
    wrapper = tmp_path / "haproxy"
    assert "0.0.0.0" in wrapper.read_text() and os.access(wrapper, os.X_OK)
    for container in _containers(service):
        (path,) = [each["value"] for each in container["env"] if each["name"] == "RAY_SERVE_HAPROXY_BINARY_PATH"]
        assert path == f"/home/nanoserve/{wrapper.name}"


def test_the_volumes_that_are_mounted_are_there(service: Any) -> None:
    cluster = service["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }


def test_ray_is_the_version_we_are_tested_with(service: Any) -> None:
    pinned = re.search(r"^ray==([0-9.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and service["rayClusterConfig"]["rayVersion"] == pinned[1]


def test_the_image_copies_what_is_there_and_may_be_copied() -> None:
    allowed = (ROOT / ".dockerignore").read_text().split()
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            *sources, _ = shlex.split(line)[1:]
            for source in sources:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in allowed, f"{source} is kept out by .dockerignore"


def test_what_the_services_mount_is_there() -> None:
    services = _compose("compose.yaml")["services"]
    mounts = [volume for service in services.values() for volume in service.get("volumes", ())]
    for source in (mount.split(":")[0] for mount in mounts if mount.startswith(".")):
        assert (DEPLOY / source).exists(), source
    assert (DEPLOY / services["server"]["build"]["dockerfile"]).name == "Dockerfile"
    assert (DEPLOY / services["server"]["build"]["context"]).resolve() == ROOT


def test_nothing_is_published_beyond_this_machine() -> None:
    for name, service in _compose("compose.yaml")["services"].items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port}"


def test_grafana_has_no_administrator_with_the_password_that_everybody_knows() -> None:
    environment = _compose("compose.yaml")["services"]["grafana"]["environment"]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_without_a_gpu_none_is_reserved() -> None:
    override = _compose("compose.cpu.yaml")["services"]["server"]
    assert override["deploy"]["resources"]["reservations"]["devices"] == []
