"""What is in deploy/ fits the server: metrics that exist, settings that are read, files that are mounted."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.api.hosts import Hosts
from server.settings import VARIABLES, read_settings
from tests.server.api.support import COMPLETIONS, completion, serving

REPO = Path(__file__).parents[2]
DEPLOY = REPO / "deploy"
COMPOSE = yaml.safe_load((REPO / "docker-compose.yml").read_text())


def manifests() -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for item in value.values():
                yield from texts(item)
        case list():
            for item in value:
                yield from texts(item)


async def test_the_dashboard_asks_for_metrics_that_there_are(tmp_path: Path) -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    asked = {name for text in texts(dashboard) for name in re.findall(r"quantserve:\w+", text)}
    async with serving(tmp_path) as http:
        assert (await http.post(COMPLETIONS, json=completion())).status_code == 200
        assert (await http.post(COMPLETIONS, json={})).status_code == 400
        exposed = (await http.get("/metrics")).text
    there = set(re.findall(r"^(quantserve:\w+)", exposed, re.MULTILINE))
    families = {name for kind, name in re.findall(r"^# (TYPE) (quantserve:\w+)", exposed, re.MULTILINE)}
    assert len(asked) > 15
    assert asked - there - families == set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_kubernetes_manifests_hang_together() -> None:
    claim, deployment, service = manifests()
    assert [one["kind"] for one in (claim, deployment, service)] == [
        "PersistentVolumeClaim",
        "Deployment",
        "Service",
    ]
    pod = deployment["spec"]["template"]
    [container] = pod["spec"]["containers"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {entry["name"] for entry in container["env"]} <= {"NAMESPACE", *VARIABLES.values()}
    assert "annotations" not in pod["metadata"]  # what scrapes by annotation has no key for /metrics
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_compose_mounts_files_that_there_are_and_gives_no_rights_away() -> None:
    for service in COMPOSE["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (REPO / source).exists()
    for service in ("cpu", "gpu"):
        assert set(COMPOSE["services"][service]["environment"]) <= set(VARIABLES.values())


def test_prometheus_scrapes_the_server() -> None:
    [job] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    assert target.split(":")[0] in COMPOSE["services"]
    source = yaml.safe_load((DEPLOY / "grafana-source.yml").read_text())["datasources"][0]
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}


def image() -> dict[str, str]:
    """The variables that the image sets."""
    text = (REPO / "Dockerfile").read_text().replace("\\\n", " ")
    pairs = (re.findall(r"([A-Z_]+)=(\S+)", line) for line in re.findall(r"^ENV (.*)$", text, re.MULTILINE))
    return {name: value for found in pairs for name, value in found}


def hosts_of(environ: dict[str, str]) -> Hosts:
    here = {name: value for name, value in environ.items() if not name.endswith("_FILE")}  # files are there
    return Hosts.of(read_settings({**image(), **here, "QUANTSERVE_ALLOW_NO_KEY": "1"}))


def probed() -> str:
    [host] = re.findall(r"urlopen\('http://([^/]+)/health'", (REPO / "Dockerfile").read_text())
    return str(host)


@pytest.mark.parametrize("service", ["cpu", "gpu"])
def test_compose_answers_the_hosts_that_it_causes(service: str) -> None:
    """Prometheus, other containers, the published port and the image's own probe."""
    [job] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    own = COMPOSE["services"][service]
    [published] = [port.rsplit(":", 1)[0] for port in own["ports"]]
    hosts = hosts_of(own["environment"])
    for host in (target, f"{service}:8000", service, published, "localhost:8000", probed()):
        assert hosts.allow([host]), host
    assert not hosts.allow(["evil.example:8000"])


@pytest.mark.parametrize("namespace", ["default", "models"])
def test_kubernetes_answers_the_hosts_that_it_causes(namespace: str) -> None:
    """The service by each of its names, and the kubelet's probes, which ask the pod's address."""
    _, deployment, service = manifests()
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    environ = {
        entry["name"]: entry.get("value", namespace).replace("$(NAMESPACE)", namespace)
        for entry in container["env"]
    }
    names = [entry["name"] for entry in container["env"]]
    assert names.index("NAMESPACE") < names.index("QUANTSERVE_ALLOWED_HOSTS")  # only earlier ones are put in
    [port] = service["spec"]["ports"]
    hosts, name = hosts_of(environ), service["metadata"]["name"]
    for end in ("", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local"):
        assert hosts.allow([name + end])
        assert hosts.allow([f"{name}{end}:{port['port']}"])
    assert hosts.allow([f"10.0.0.3:{container['ports'][0]['containerPort']}"])
    assert not hosts.allow([f"{name}.elsewhere.svc"])
    scraped = re.search(r"targets: \[(quantserve\.NAMESPACE\S+)\]", (REPO / "docs/deploy.md").read_text())
    assert scraped is not None
    assert hosts.allow([scraped[1].replace("NAMESPACE", namespace)])


def test_the_systemd_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "quantserve.service").read_text()
    named = set(re.findall(r"QUANTSERVE_\w+", unit))
    assert named <= set(VARIABLES.values())
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not here")
    path = tmp_path / "quantserve.service"
    path.write_text(re.sub(r"^ExecStart=.*$", "ExecStart=/bin/true", unit, flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
    )
    assert "quantserve.service" not in done.stderr, done.stderr
