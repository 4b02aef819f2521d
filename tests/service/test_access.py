"""API keys: shown once, kept as digests, good for their scopes and their owner until they are revoked."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, text

from core.errors import Forbidden, NotFound, Unauthenticated, UserError
from core.jobs.access import LOCAL, LOCAL_OWNER, SCOPES, AccessService
from core.jobs.views import Scope

BOOTSTRAP = "0123456789abcdef"


@pytest.fixture
def access(engine: Engine) -> AccessService:
    return AccessService(engine)


def test_a_secret_is_told_once_and_kept_nowhere(access: AccessService, engine: Engine) -> None:
    made = access.create_key("ada", ["write"])
    with engine.connect() as connection:
        (row,) = connection.execute(text("SELECT * FROM api_key")).mappings()
    stored = " ".join(map(str, row.values()))
    assert made.secret not in stored
    assert row["sha256"] == hashlib.sha256(made.secret.encode()).hexdigest()
    # What is shown of the secret is enough to tell keys apart and leaves more than 200 of its 256 bits.
    assert made.view.prefix == made.secret[:8]
    assert len(made.secret) - len("bm_") - 5 >= 200 / 6
    assert made.secret not in str(access.list_keys("ada"))


def test_no_two_keys_are_alike(access: AccessService) -> None:
    made = [access.create_key("ada", ["read"]) for _ in range(5)]
    assert len({key.secret for key in made}) == len({key.view.id for key in made}) == 5


@pytest.mark.parametrize(
    ("given", "implied"),
    [
        (["read"], {"read"}),
        (["write"], {"read", "write"}),
        (["admin"], {"read", "write", "admin"}),
        (["read", "write", "read"], {"read", "write"}),
    ],
)
def test_a_wider_scope_implies_the_narrower_ones(access: AccessService, given: list[Scope], implied: set[str]) -> None:
    made = access.create_key("ada", given)
    who = access.authenticate(made.secret)
    assert (who.owner, who.key_id, set(who.scopes)) == ("ada", made.view.id, implied)
    for scope in SCOPES:
        if scope in implied:
            who.require(scope)
        else:
            with pytest.raises(Forbidden, match=scope):
                who.require(scope)


@pytest.mark.parametrize("scopes", [[], ["root"], ["read", "everything"]])
def test_a_key_has_at_least_one_scope_that_there_is(access: AccessService, scopes: list[Scope]) -> None:
    with pytest.raises(UserError) as refused:
        access.create_key("ada", scopes)
    assert refused.value.where == "scopes"
    assert access.list_keys("ada") == ()


def test_what_is_no_living_key_opens_nothing(access: AccessService) -> None:
    made = access.create_key("ada", ["admin"])
    digest = hashlib.sha256(made.secret.encode()).hexdigest()
    for secret in ("", made.secret[:-1], made.secret + " ", made.secret.upper(), made.view.prefix, digest, "é\ud7ff"):
        with pytest.raises(Unauthenticated):
            access.authenticate(secret)


def test_a_revoked_key_is_of_no_use_and_stays_listed(access: AccessService) -> None:
    made, other = access.create_key("ada", ["write"]), access.create_key("ada", ["write"])
    access.revoke("ada", made.view.id)
    with pytest.raises(Unauthenticated):
        access.authenticate(made.secret)
    assert access.authenticate(other.secret).owner == "ada"
    assert {key.id: key.revoked_at is not None for key in access.list_keys("ada")} == {
        made.view.id: True,
        other.view.id: False,
    }
    with pytest.raises(NotFound):
        access.revoke("ada", made.view.id)


def test_another_owner_neither_sees_nor_revokes_a_key(access: AccessService) -> None:
    made = access.create_key("ada", ["write"])
    assert access.list_keys("eve") == ()
    with pytest.raises(NotFound):
        access.revoke("eve", made.view.id)
    assert access.authenticate(made.secret).owner == "ada"


def test_the_first_key_is_made_once_however_often_and_by_however_many_processes(access: AccessService) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(access.ensure_bootstrap, [BOOTSTRAP] * 8))
    (key,) = access.list_keys(LOCAL_OWNER)
    assert (key.scopes, key.prefix) == (("admin",), "bootstrap")
    assert access.authenticate(BOOTSTRAP).scopes == set(SCOPES)


def test_a_first_key_that_was_revoked_stays_revoked(access: AccessService) -> None:
    access.ensure_bootstrap(BOOTSTRAP)
    access.revoke(LOCAL_OWNER, access.list_keys(LOCAL_OWNER)[0].id)
    access.ensure_bootstrap(BOOTSTRAP)
    with pytest.raises(Unauthenticated):
        access.authenticate(BOOTSTRAP)


def test_a_first_key_that_can_be_guessed_is_refused(access: AccessService) -> None:
    with pytest.raises(UserError) as refused:
        access.ensure_bootstrap(BOOTSTRAP[:-1])
    assert refused.value.where == "BITMILL_BOOTSTRAP_KEY"
    assert access.list_keys(LOCAL_OWNER) == ()


def test_where_authentication_is_off_everybody_may_do_everything() -> None:
    for scope in SCOPES:
        LOCAL.require(scope)
    assert LOCAL.owner == LOCAL_OWNER
