"""vLLM compiles anew for every new API key: a user's servers get one that stays."""

import concurrent.futures
import stat

from tuner.server.keys import kept_key


def test_the_key_is_made_once_and_only_its_user_reads_it(tmp_path):
    folder = tmp_path / "cache"
    key = kept_key(folder)
    assert len(key) == 48 and kept_key(folder) == key
    [file] = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_two_users_have_two_keys(tmp_path):
    assert kept_key(tmp_path / "a") != kept_key(tmp_path / "b")


def test_many_at_once_agree_on_one(tmp_path):
    with concurrent.futures.ProcessPoolExecutor(4) as pool:
        assert len(set(pool.map(kept_key, [tmp_path] * 16))) == 1


def test_where_nothing_can_be_kept_there_is_a_key_all_the_same(tmp_path):
    (tmp_path / "file").touch()
    key = kept_key(tmp_path / "file")
    assert len(key) == 48 and kept_key(tmp_path / "file") != key
