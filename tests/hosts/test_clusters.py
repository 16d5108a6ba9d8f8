"""Who is who, by environments written by hand; JAX's own answer is the oracle."""

import http.server
import threading

import pytest
from jax._src.clusters import cloud_tpu_cluster
from jax._src.clusters.slurm_cluster import SlurmCluster

from rlhf_jax.errors import UserError
from rlhf_jax.hosts import clusters
from rlhf_jax.hosts.clusters import Job, find_job

GIVEN = {
    "JAX_COORDINATOR_ADDRESS": "node1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "TPU_SKIP_MDS_QUERY": "1",
}
GKE = {
    "TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.2,127.0.0.3,127.0.0.4",
    "TPU_WORKER_ID": "2",
}
SLICES = {
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
}
POD = {
    "JOB_COMPLETION_INDEX": "1",
    "JAX_NUM_PROCESSES": "2",
    "JOBSET_NAME": "rlhf",
    "REPLICATED_JOB_NAME": "hosts",
}
# Attributes of the metadata server of a TPU VM.
ENDPOINTS = "worker-network-endpoints"
ATTRIBUTES = {
    ENDPOINTS: "unknown:1:10.0.0.4,unknown:2:10.0.0.5",
    "agent-worker-number": "1",
    "tpu-env": "ACCELERATOR_TYPE: 'v4-16'\nWORKER_ID: '1'\n",
}


def jaxs(cluster, monkeypatch, env):
    """What JAX's own class reads from the environment."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    address = cluster.get_coordinator_address(5, env.get("JAX_COORDINATOR_PORT"))
    return address, cluster.get_process_count(), cluster.get_process_id()


@pytest.fixture
def metadata():
    """The address of a metadata server, and what it has."""
    attributes = {}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rpartition("/")[2])
            known = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", attributes
        server.shutdown()


def test_alone():
    none = {"TPU_SKIP_MDS_QUERY": "1"}
    assert find_job(none) is None
    assert find_job(none | {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_job({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    assert find_job(none | {"JOB_COMPLETION_INDEX": "0"}) is None  # told of no others


def test_what_is_given_comes_first():
    want = Job("node1:1234", 4, 3)
    for others in ({"TPU_SKIP_MDS_QUERY": "1"}, GKE, POD, {**SLURM, **GKE}):
        assert find_job(others | GIVEN)[:3] == want[:3]
    address = {"JAX_COORDINATOR_ADDRESS": "[::1]:7"}
    assert find_job(POD | address) == Job("[::1]:7", 2, 1)


@pytest.mark.parametrize(
    "nodes", ["gpu[007-008]", "gpu7,gpu8", "gpu[7,9-12],other[1-3]", "gpu7"]
)
@pytest.mark.parametrize("port", [{}, {"JAX_COORDINATOR_PORT": "5000"}])
def test_slurm_as_in_jax(monkeypatch, nodes, port):
    env = SLURM | {"SLURM_STEP_NODELIST": nodes} | port
    assert find_job(env)[:3] == jaxs(SlurmCluster, monkeypatch, env)


def test_slurm_names_with_several_brackets():
    env = SLURM | {"SLURM_STEP_NODELIST": "rack[2-3]-node[05,07],login"}
    assert find_job(env).address.startswith("rack2-node05:")


def test_gpus_of_a_slurm_task():
    """Eight tasks on a node share its GPUs, unless Slurm gave each its own."""
    assert find_job(SLURM).devices == (3,)
    assert find_job(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).devices == (3,)
    assert find_job(SLURM | {"CUDA_VISIBLE_DEVICES": "0"}).devices is None
    assert find_job(SLURM | {"SLURM_STEP_NUM_NODES": "16"}).devices is None
    assert find_job(SLURM | {"JAX_LOCAL_DEVICE_IDS": "1,2"}).devices is None


@pytest.mark.parametrize("slices", [{}, SLICES])
@pytest.mark.parametrize("port", [{}, {"JAX_COORDINATOR_PORT": "5000"}])
def test_tpus_on_gke_as_in_jax(monkeypatch, slices, port):
    env = GKE | slices | port
    cluster = cloud_tpu_cluster.GkeTpuCluster
    assert find_job(env)[:3] == jaxs(cluster, monkeypatch, {**SLICES_OFF, **env})


# JAX asks the metadata server for what is unset.
SLICES_OFF = dict.fromkeys(SLICES, "")


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {ENDPOINTS: "10.0.0.4,10.0.0.5,10.0.0.6"},
        {"tpu-env": "".join(f"{key}: '{value}'\n" for key, value in SLICES.items())},
    ],
)
def test_tpu_vms_as_in_jax(monkeypatch, metadata, changed):
    address, attributes = metadata
    attributes.update(ATTRIBUTES | changed)
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: name)
    env = {"GCE_METADATA_IP": address}
    cluster = cloud_tpu_cluster.GceTpuCluster
    assert find_job(env)[:3] == jaxs(cluster, monkeypatch, env)


def test_a_machine_that_is_no_tpu_vm(monkeypatch, metadata):
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: name)
    assert find_job({"GCE_METADATA_IP": metadata[0]}) is None
    metadata[1].update(ATTRIBUTES)
    assert find_job({"GCE_METADATA_IP": metadata[0]}).processes == 2
    for reason in ({"TPU_SKIP_MDS_QUERY": "1"}, {"JAX_PLATFORMS": "cpu"}):
        assert find_job({"GCE_METADATA_IP": metadata[0]} | reason) is None


def test_pods():
    assert find_job(POD) == Job("rlhf-hosts-0-0.rlhf:8482", 2, 1)
    alone = {k: v for k, v in POD.items() if k != "JOBSET_NAME"}
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS"):
        find_job(alone)
    address = {"JAX_COORDINATOR_ADDRESS": "trainer-0.trainer:7000"}
    assert find_job(alone | address) == Job("trainer-0.trainer:7000", 2, 1)


def test_open_mpi():
    env = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
    with pytest.raises(UserError, match="no JAX_COORDINATOR_ADDRESS in the"):
        find_job(env)
    address = {"JAX_COORDINATOR_ADDRESS": "node1:1234"}
    assert find_job(env | address) == Job("node1:1234", 4, 2)
    local = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert find_job(env | address | local) == Job("node1:1234", 4, 2, (0,))


@pytest.mark.parametrize("name", GIVEN)
def test_half_given(name):
    env = {k: v for k, v in GIVEN.items() if k != name}
    with pytest.raises(UserError, match=f"but no {name} in the environment: give"):
        find_job(env)
    with pytest.raises(UserError, match=f"there is {name} but no "):
        find_job({name: GIVEN[name]})


@pytest.mark.parametrize(
    ("env", "told"),
    [
        (GIVEN | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 must be below JAX_NUM_PRO"),
        (GIVEN | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID='one' must be a whole"),
        (GIVEN | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES='0' must be a whole"),
        (GIVEN | {"JAX_NUM_PROCESSES": "-2"}, "of at least 1"),
        (GIVEN | {"JAX_COORDINATOR_ADDRESS": "node1"}, "'node1' must be host:port"),
        (GIVEN | {"JAX_COORDINATOR_ADDRESS": ":80"}, "':80' must be host:port"),
        (GIVEN | {"JAX_COORDINATOR_ADDRESS": "a:99999"}, "must be host:port"),
        (SLURM | {"JAX_COORDINATOR_PORT": "x"}, "JAX_COORDINATOR_PORT='x' must"),
        (SLURM | {"SLURM_PROCID": ""}, "there is no SLURM_PROCID: start the processes"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS='many' must"),
        (GKE | {"TPU_WORKER_ID": ""}, "TPU_WORKER_ID='' must be a whole number"),
        (POD | {"JOB_COMPLETION_INDEX": "2"}, "must be below JAX_NUM_PROCESSES=2"),
    ],
)
def test_what_cannot_be(env, told):
    with pytest.raises(UserError) as error:
        find_job(env)
    assert told in str(error.value)
