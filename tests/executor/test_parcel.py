import pytest

from tuner.errors import EnvironmentFault
from tuner.executor import parcel


def trial(folder):
    (folder / "a").mkdir(parents=True)
    (folder / "server.log").write_text("ready\n")
    (folder / "a" / "records.parquet").write_bytes(b"x" * 1000)
    (folder / "link").symlink_to("/etc/hostname")
    return folder


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_trial_comes_home_with_all_its_files_and_without_its_links(tmp_path):
    packed = parcel.pack(trial(tmp_path / "there"))
    parcel.unpack(packed, tmp_path / "home")
    assert files(tmp_path / "home") == {"server.log": b"ready\n", "a/records.parquet": b"x" * 1000}


def test_what_is_large_goes_over_the_store_and_is_removed_there(tmp_path):
    packed = parcel.pack(trial(tmp_path / "there"), f"file://{tmp_path}/store", large_bytes=100)
    assert packed.files == {} and packed.url
    assert len(files(tmp_path / "store")) == 2
    parcel.unpack(packed, tmp_path / "home")
    assert files(tmp_path / "home") == {"server.log": b"ready\n", "a/records.parquet": b"x" * 1000}
    assert files(tmp_path / "store") == {}


def test_a_store_that_only_the_node_can_read_is_named(tmp_path):
    lost = parcel.Parcel(url=f"file://{tmp_path}/nowhere")
    with pytest.raises(EnvironmentFault, match="nothing is found"):
        parcel.unpack(lost, tmp_path / "home")
    with pytest.raises(EnvironmentFault, match=r"executor.store nosuch://"):
        parcel.pack(trial(tmp_path / "there"), "nosuch://bucket", large_bytes=1)
