"""launch/: what the files start, with stand-ins for the clusters' own commands."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import setuptools
import yaml

from rlhf_jax.hosts.clusters import Job, find_job
from tests import processes
from tests.trainers.conftest import alone, quick, world
from tests.trainers.runs import metrics_of

__all__ = ["alone", "quick", "world"]

LAUNCH = processes.ROOT / "launch"
SCRIPTS = ["slurm.sh", "tpu_pod.sh"]
FILES = [*SCRIPTS, "gke_jobset.yaml", "Dockerfile"]

# srun on this machine: its options, then one process for each task.
SRUN = """#!/bin/bash
echo "srun $*" >> "$LOG"
[ -n "$STATUS" ] && exit "$STATUS"
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=$TASKS SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST=127.0.0.1
for ((task = 1; task < TASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" > "$LOG.$task" &
done
SLURM_PROCID=0 SLURM_LOCALID=0 "$@"
wait
"""
NOTED = '#!/bin/bash\necho "$(basename "$0") $*" >> "$LOG"\n'
PYTHON = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n'


@pytest.fixture
def cluster(tmp_path):
    """Its commands in a folder, as the environment to start in; and what they noted."""
    tools = {"srun": SRUN, "scontrol": NOTED, "gcloud": NOTED, "python": PYTHON}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = {"SLURM_JOB_ID": str(os.getpid()), "STATUS": "", "TASKS": "2"}
    return env | job | {"LOG": str(tmp_path / "log")}


def bash(script, *arguments, env):
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(
        command,
        cwd=processes.ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def noted(env):
    return pathlib.Path(env["LOG"]).read_text().splitlines()


def tiny(world, workdir):
    """A run of one phase on the whole mesh, as flags."""
    settings = world.settings("ppo") | {"workdir": workdir, "total_phases": 1}
    settings |= {"mesh.fsdp": 2, "remat": False}
    return [
        "--config=configs/ppo.py",
        *(f"--config.{k}={v}" for k, v in settings.items()),
    ]


def jobset():
    (job,) = read("gke_jobset.yaml")["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    return job, spec, container


def read(name):
    return yaml.safe_load((LAUNCH / name).read_text("utf-8"))


def pods():
    """The environments of the pods, as Kubernetes would make them."""
    job, spec, container = jobset()
    fields = {
        "metadata.annotations['jobset.sigs.k8s.io/jobset-name']": read(
            "gke_jobset.yaml"
        )["metadata"]["name"],
        "metadata.annotations['jobset.sigs.k8s.io/replicatedjob-name']": job["name"],
    }
    env = {
        entry["name"]: entry.get("value")
        or fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        for entry in container["env"]
    }
    indices = range(spec["completions"])
    return [env | {"JOB_COMPLETION_INDEX": str(index)} for index in indices]


@pytest.mark.parametrize("name", FILES)
def test_the_command_is_at_the_top(name):
    head = (LAUNCH / name).read_text("utf-8").split("\n\n")[0]
    lines = [line for line in head.splitlines() if line.startswith("#     ")]
    assert any(name in line for line in lines), head


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_it(name):
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    assert os.access(LAUNCH / name, os.X_OK)


def test_slurm_script_trains(world, alone, cluster, tmp_path):
    """Two tasks on this machine, with a device each."""
    env = cluster | {name: alone[name] for name in alone.keys() - {"PATH"}}
    done = bash("slurm.sh", *tiny(world, tmp_path / "run"), env=env)
    assert done.returncode == 0, done.stderr
    assert "data=1 x fsdp=2 x tensor=1 on 2 cpu" in done.stdout
    assert "phase 1/1" in done.stdout
    assert processes.spoken(pathlib.Path(f"{env['LOG']}.1").read_text()) == []
    assert [row["phase"] for row in metrics_of(tmp_path / "run")] == [0, 1]
    assert [line.split()[0] for line in noted(env)] == ["srun"]


@pytest.mark.parametrize(("status", "again"), [(143, True), (2, False), (1, False)])
def test_a_job_that_was_stopped_is_queued_again(cluster, status, again):
    done = bash("slurm.sh", "--config=a b.py", env=cluster | {"STATUS": str(status)})
    assert done.returncode == status
    called, *more = noted(cluster)
    assert called.endswith("python -m rlhf_jax.train --config=a b.py")
    assert more == ([f"scontrol requeue {cluster['SLURM_JOB_ID']}"] if again else [])


def test_slurm_asks_for_a_task_on_every_gpu():
    text = (LAUNCH / "slurm.sh").read_text("utf-8")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"].startswith("TERM@") and "requeue" in asked


def test_tpu_script_runs_on_all_workers(cluster):
    settings = ["--config=configs/ppo.py", "--config.workdir=/mnt/my runs/$x"]
    done = bash("tpu_pod.sh", "my-tpu", "us-central2-b", *settings, env=cluster)
    assert done.returncode == 0, done.stderr
    *before, last = noted(cluster)
    assert all(
        "--worker=all" in line and "--zone=us-central2-b" in line for line in before
    )
    assert any(" scp " in line and line.endswith("my-tpu:rlhf/") for line in before)
    assert any("pip install" in line and "[tpu]" in line for line in before)
    start, _, command = last.partition(" --command=")
    assert start.startswith("gcloud compute tpus tpu-vm ssh my-tpu ")
    parts = shlex.split(command)
    assert parts[parts.index("-m") :] == ["-m", "rlhf_jax.train", *settings]


def test_jobset_says_who_is_who():
    _, spec, _ = jobset()
    count = spec["completions"]
    address = "rlhf-hosts-0-0.rlhf:8482"  # <jobset>-<job>-<index>-<pod>.<jobset>
    assert [find_job(pod) for pod in pods()] == [
        Job(address, count, index) for index in range(count)
    ]


def test_jobset_is_one_that_kubernetes_takes():
    whole = read("gke_jobset.yaml")
    assert (whole["apiVersion"], whole["kind"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
    )
    job, spec, container = jobset()
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    assert job.get("replicas", 1) == 1  # the index alone is the process
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (workdir,) = [a for a in container["args"] if "workdir" in a]
    assert any(m["mountPath"] in workdir for m in container["volumeMounts"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_the_image_trains():
    entry = re.search(r"^ENTRYPOINT (.*)$", (LAUNCH / "Dockerfile").read_text(), re.M)
    assert json.loads(entry[1]) == ["python", "-m", "rlhf_jax.train"]


def test_the_images_extras_are_there(monkeypatch):
    found = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    spec = importlib.util.spec_from_file_location("setup", processes.ROOT / "setup.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    text = "\n".join((LAUNCH / name).read_text("utf-8") for name in FILES)
    named = re.findall(r"EXTRA=(\w+)", text) + re.findall(r"\.\[(\w+)\]", text)
    assert set(named) == {"cuda12", "tpu"}
    assert set(named) <= found["extras_require"].keys()
    copied = re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.M)
    for name in " ".join(copied).split():
        assert (processes.ROOT / name).exists()


def test_variables_are_those_that_are_read():
    """What the files set is in the sources, letter by letter."""
    folder = processes.ROOT / "rlhf_jax" / "hosts"
    sources = "".join(path.read_text("utf-8") for path in folder.glob("*.py"))
    *_, container = jobset()
    for entry in container["env"]:
        assert f'"{entry["name"]}"' in sources
