"""What a Hub does that a client must be ready for: where that was read, where qz handles it, and the tests of that.

A row's tests fail when its handling is taken out of qz. A change of the Hub is a row here, and what plays it: a rule,
or a ``Fault`` that a test orders.
"""

from __future__ import annotations

from dataclasses import dataclass

_CLIENT = "huggingface_hub 2.4, utils/_http.py"
_DOWNLOAD = "huggingface_hub 2.4, file_download.py"
_CAS = "hub-docs, docs/xet; hf_xet 1.8"
_RATES = "hub-docs, docs/hub/rate-limits.md"
_HTTP = "RFC 9110"
_OIDC = "hub-docs, docs/hub/trusted-publishers.md"
_COMMIT = "huggingface_hub 2.4, _commit_api.py"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """``handled``: module and name below ``qz.formats``. ``tests``: module without "test_", and function without it.
    ``rules``: those of ``Rules`` that play it."""

    what: str
    source: str
    handled: str
    tests: str
    rules: tuple[str, ...] = ()


_LINKS, _RANGES, _REQUESTS = "hub.transport.links", "hub.transport.ranges", "hub.transport.requests"
_ERRORS, _XET, _ROUTES = "hub.transport.errors", "hub.transport.xet", "hub.transport.routes"
_SESSION, _BACKOFF = "hub.transport.session", "hub.transport.backoff"
_REPO, _REMOTE, _SENT = "hub.repository", "publish.remote", "publish.xet"

BEHAVIOURS: dict[str, tuple[Behaviour, ...]] = {
    "1. links for one range": (
        Behaviour(
            "a link minted with a Range serves that Range only",
            "xet-core#897",
            f"{_LINKS}:Links.at_hub",
            "hub_hostile:a_link_serves_every_range_since_it_was_asked_for_without_one",
            ("bound_links", "binding_hosts"),
        ),
        Behaviour(
            "eight connections want a link at the same time",
            _RATES,
            f"{_LINKS}:Links.get",
            "hub_hostile:threads_that_begin_together_ask_for_a_link_once",
        ),
        Behaviour(
            "a host per redirect; a refusal that arrives when a newer link is there",
            "xet-core#897",
            f"{_LINKS}:Links.drop",
            "hub_hostile:an_old_link_is_not_missed_when_a_newer_one_is_there",
            ("hosts",),
        ),
    ),
    "2. links that end": (
        Behaviour(
            "a link expires by the server's clock",
            "datasets#7685",
            f"{_RANGES}:Connection.fetch",
            "hub_hostile:one_fetch_outlives_several_links_that_have_served",
            ("link_seconds",),
        ),
        Behaviour(
            "every link of one host is refused",
            "datasets#8328",
            f"{_RANGES}:_note",
            "hub_hostile:links_of_a_host_whose_keys_are_broken_are_asked_for_again",
            ("outage",),
        ),
        Behaviour(
            "every link is refused, with the reason in XML",
            "datasets#8328",
            f"{_REQUESTS}:first_line",
            "hub_hostile:an_outage_of_the_cdn_is_told_in_its_own_words_and_takes_two_links",
        ),
    ),
    "3. ranges": (
        Behaviour(
            "400 for a large file",
            "huggingface_hub#4330",
            f"{_RANGES}:_note",
            "hub_hostile:a_400_is_no_expired_link",
        ),
        Behaviour(
            "400 for what is asked for without a Range",
            "huggingface_hub#4330, xet-core#592",
            f"{_RANGES}:Connection._range",
            "hub_hostile:nothing_is_asked_of_the_cdn_without_a_range",
            ("largest_unranged", "largest_served"),
        ),
        Behaviour(
            "a link minted by HEAD serves no GET",
            "huggingface.js#1024",
            f"{_REQUESTS}:Requests.get",
            "hub_hostile:links_are_minted_by_get",
            ("head_links_serve_get",),
        ),
        Behaviour(
            "416: the file is shorter than listed",
            _HTTP,
            f"{_RANGES}:Connection._require_success",
            "hub_hostile:a_file_that_has_become_shorter_is_told",
        ),
        Behaviour(
            "200 for a Range",
            _HTTP,
            f"{_RANGES}:Connection._require_range",
            "hub:a_file_without_ranges_is_copied_to_the_disk_only_when_asked_for",
        ),
        Behaviour(
            "206 without Content-Range, or one that says nothing",
            _HTTP,
            f"{_RANGES}:CONTENT_RANGE",
            "hub_hostile:content_range_is_believed_only_if_it_is_one",
        ),
        Behaviour(
            "206 with other bytes than asked for",
            _HTTP,
            f"{_RANGES}:Connection._require_range",
            "hub:weights_that_do_not_arrive_whole_never_become_an_output",
        ),
    ),
    "4. limits of rates": (
        Behaviour(
            "429 with RateLimit and without Retry-After",
            _RATES,
            f"{_SESSION}:seconds_asked",
            "hub_hostile:the_windows_of_the_rate_limit_are_waited_out_and_said",
            ("rate_window", "api_anonymous", "api_user", "resolvers_anonymous", "resolvers_user"),
        ),
        Behaviour(
            "the rest of the window is rounded down",
            _CLIENT,
            f"{_SESSION}:seconds_asked",
            "hub_hostile:a_second_more_than_the_rest_of_the_window_is_waited",
        ),
        Behaviour(
            "429 with Retry-After",
            _HTTP,
            f"{_SESSION}:seconds_asked",
            "hub:a_rate_limit_is_waited_for_as_long_as_the_hub_asks",
            ("retry_after",),
        ),
        Behaviour(
            "more than five minutes are asked for",
            _RATES,
            f"{_BACKOFF}:Backoff.back_off",
            "hub_hostile:a_wait_beyond_patience_is_left_to_the_user",
        ),
        Behaviour(
            "all connections were refused together",
            _RATES,
            f"{_BACKOFF}:Backoff.until_allowed",
            "hub_hostile:connections_do_not_come_back_together_after_a_wait",
        ),
        Behaviour(
            "t = 0, and headers that are none", _RATES, f"{_SESSION}:seconds_asked", "hub_hostile:odd_limits_are_limits"
        ),
    ),
    "5. failures that pass": (
        Behaviour(
            "5xx, 429, dropped and cut connections, at any step",
            _HTTP,
            f"{_SESSION}:with_retries",
            "hub:a_passing_failure_at_any_step_is_overcome",
        ),
        Behaviour(
            "a body that ends early, again and again",
            "huggingface_hub#4893",
            f"{_RANGES}:Connection.fetch",
            "hub_hostile:a_connection_that_brings_something_each_time_may_break_more_often_than_one_that_does_not",
        ),
        Behaviour(
            "a reset in mid-body",
            "xet-core#897",
            f"{_RANGES}:Connection.fetch",
            "hub_hostile:a_reset_in_mid_body_is_continued_where_it_broke",
        ),
        Behaviour(
            "a server that is silent", _HTTP, f"{_REQUESTS}:Requests.get", "hub:a_server_that_hangs_is_asked_again"
        ),
        Behaviour(
            "a trickle",
            "xet-core#800",
            "hub.transport.limits:_Bounded",
            "hub_hostile:a_trickle_is_given_up_and_asked_for_again",
        ),
        Behaviour(
            "every request of a while fails",
            "status.huggingface.co",
            f"{_BACKOFF}:Retries.wait",
            "hub_hostile:a_burst_of_failures_is_outlasted",
        ),
        Behaviour(
            "408, and 504 with a page of HTML",
            _HTTP,
            f"{_ERRORS}:BUSY",
            "hub_hostile:a_page_of_html_from_a_gateway_is_a_failure_that_passes",
        ),
        Behaviour(
            "a flipped byte in a large file",
            "xet-core#604",
            "hub.read_ahead:ReadAhead._hash",
            "hub:one_wrong_byte_of_the_right_size_is_found_wherever_it_is",
        ),
        Behaviour(
            "a flipped byte in a small file",
            "xet-core#604",
            f"{_REPO}:HubFolder._require_digest",
            "hub:a_small_file_that_arrives_wrong_is_refused_at_once",
        ),
        Behaviour(
            "other bytes the second time",
            "xet-core#604",
            "hub.read_ahead:_Stream.same",
            "hub:bytes_that_are_read_again_must_be_the_same_again",
        ),
    ),
    "6. connections": (
        Behaviour(
            "closed between two requests: httpx2 opens another; where that races, as any that breaks",
            "RFC 9112, 9.3",
            f"{_ERRORS}:RETRYABLE",
            "hub:a_passing_failure_at_any_step_is_overcome",
            ("requests_per_connection",),
        ),
    ),
    "7. redirects": (
        Behaviour(
            "to the CDN: the token stays",
            _DOWNLOAD,
            f"{_REQUESTS}:Requests.get",
            "hub:the_token_is_never_sent_to_where_the_hub_redirects_to",
        ),
        Behaviour(
            "307 within the Hub, for small files: the token goes along",
            _DOWNLOAD,
            f"{_LINKS}:Links.at_hub",
            "hub:the_token_is_never_sent_to_where_the_hub_redirects_to",
        ),
        Behaviour(
            "several hosts one after the other; a relative Location",
            "RFC 9110, 10.2.2",
            f"{_RANGES}:Connection._answer",
            "hub_hostile:redirects_beyond_the_hub_are_followed_with_the_range_and_without_the_token",
            ("relays",),
        ),
        Behaviour(
            "to what is no web address",
            _HTTP,
            f"{_REQUESTS}:target_of",
            "hub_hostile:a_redirect_to_no_web_address_is_an_error_of_the_hub",
        ),
    ),
    "8. what is said of a file": (
        Behaviour(
            "X-Linked-Etag is another hash than the listing's",
            _DOWNLOAD,
            f"{_LINKS}:Links._require_commit",
            "hub:an_answer_from_another_commit_is_refused",
        ),
        Behaviour(
            "xetHash in the listing",
            "hub-docs, docs/xet/auth",
            "hub.listing:_file",
            "hub_xet:what_the_cdn_refuses_comes_over_xet",
            ("xet",),
        ),
        Behaviour(
            "an LFS file without one",
            "hub-docs, docs/xet",
            f"{_XET}:Xet.why_not",
            "hub_xet:why_a_file_cannot_come_over_xet_is_said",
            ("without_xet",),
        ),
    ),
    "9. Xet": (
        Behaviour(
            "the CDN refuses, Xet does not",
            "hub-docs, docs/xet/api",
            f"{_ROUTES}:Routes.fetch",
            "hub_xet:what_the_cdn_refuses_comes_over_xet",
            ("reconstructions_v2",),
        ),
        Behaviour(
            "401, 403, 404, 416, 429, 503: hf_xet's stream ends early, often without an error",
            _CAS,
            f"{_XET}:Xet._read",
            "hub_xet:a_lasting_failure_of_both_ways_names_both",
        ),
        Behaviour(
            "Xet fails, the CDN does not any more",
            _CAS,
            f"{_ROUTES}:Routes.fetch",
            "hub_xet:the_cdn_is_tried_once_more_when_xet_fails",
        ),
        Behaviour(
            "a failure that passes",
            _CAS,
            f"{_XET}:Xet.fetch",
            "hub_xet:a_passing_failure_of_xet_is_overcome",
        ),
        Behaviour(
            "a token ends early",
            "hub-docs, docs/xet/auth",
            f"{_XET}:Xet._forget",
            "hub_xet:a_token_that_the_server_ends_early_is_asked_for_again",
        ),
        Behaviour(
            "a token is about to end",
            "hub-docs, docs/xet/auth",
            f"{_XET}:Xet._current_group",
            "hub_xet:a_token_about_to_expire_is_renewed_before",
            ("xet_token_seconds",),
        ),
        Behaviour(
            "a flipped byte, which hf_xet does not see",
            "xet-core#604, #967",
            "hub.read_ahead:ReadAhead._hash",
            "hub_xet:one_flipped_byte_over_xet_is_found_by_the_hash",
        ),
        Behaviour(
            "a reconstruction that lacks terms",
            _CAS,
            f"{_XET}:Xet._read",
            "hub_xet:a_reconstruction_that_lacks_terms_is_no_success",
        ),
        Behaviour(
            "a silence, in which hf_xet waits for five minutes",
            "xet-core#956",
            f"{_XET}:LONGEST_SILENCE",
            "hub_xet:a_silence_is_given_up_after_a_while",
        ),
        Behaviour(
            "a storage that is a folder of this machine",
            "hf_xet 1.8 (local://)",
            "hub.transport.trust:require_storage_on_the_web",
            "hub_xet:a_storage_that_is_not_on_the_web_is_none",
        ),
        Behaviour(
            "no Xet for a push, or no grants",
            "xet-core#974",
            f"{_SENT}:XetUploads._access",
            "push_xet:a_hub_that_has_less_gets_the_same_files",
            ("xorb_grants",),
        ),
        Behaviour(
            "a token to write with is about to end",
            "hub-docs, docs/xet/auth",
            f"{_SENT}:XetUploads._commit",
            "push_xet:a_token_for_the_storage_that_is_about_to_end_is_renewed_before",
        ),
        Behaviour(
            "what hf_xet remembers to have sent is gone",
            _CAS,
            f"{_SENT}:XetUploads.send",
            "push_xet:what_hf_xet_remembers_to_have_sent_does_not_keep_a_file_from_being_sent",
        ),
    ),
    "10. who may read": (
        Behaviour("gated", _CLIENT, f"{_ERRORS}:meaning", "hub:gated_repositories_say_where_to_ask_for_access"),
        Behaviour(
            "private and missing look the same",
            _CLIENT,
            f"{_ERRORS}:meaning",
            "hub:private_and_missing_repositories_cannot_be_told_apart",
        ),
        Behaviour(
            "a token that is unknown, or withdrawn meanwhile",
            _CLIENT,
            f"{_ERRORS}:meaning",
            "hub_hostile:a_token_that_is_revoked_while_it_is_used_is_told",
        ),
    ),
    "11. what is not there": (
        Behaviour(
            "renamed before it is read",
            _CLIENT,
            "hub.opening:open_repo",
            "hub:a_renamed_repository_is_read_under_its_new_name",
        ),
        Behaviour(
            "renamed while it is read",
            _CLIENT,
            f"{_LINKS}:Links.at_hub",
            "hub_hostile:a_repository_that_is_renamed_while_it_is_read_is_followed",
        ),
        Behaviour(
            "renamed before a push",
            _CLIENT,
            f"{_REMOTE}:Remote.target",
            "push:a_repository_that_was_renamed_is_pushed_to_under_its_new_name",
        ),
        Behaviour(
            "renamed during a push: POST is redirected, too, which huggingface_hub's session follows",
            _CLIENT,
            f"{_REMOTE}:Remote._post_commit",
            "push_xet:a_repository_that_is_renamed_on_the_way_gets_the_commit_all_the_same",
        ),
        Behaviour(
            "no such revision, no such file, disabled",
            _CLIENT,
            f"{_ERRORS}:meaning",
            "hub_hostile:each_refusal_is_told_for_what_it_is",
        ),
    ),
    "12. what changes on the way": (
        Behaviour(
            "the branch moves",
            _CLIENT,
            f"{_REPO}:HubFolder",
            "hub:a_repository_is_read_at_one_commit_even_when_its_branch_moves",
        ),
        Behaviour(
            "X-Repo-Commit of another commit",
            _DOWNLOAD,
            f"{_LINKS}:Links._require_commit",
            "hub:an_answer_from_another_commit_is_refused",
        ),
        Behaviour(
            "a weak ETag",
            "RFC 9110, 8.8.3",
            f"{_LINKS}:Links._require_commit",
            "hub_hostile:a_weak_etag_of_the_linked_file_is_its_hash_all_the_same",
            ("weak_etags",),
        ),
        Behaviour(
            "gzip although identity was asked for, by the CDN",
            "RFC 9110, 12.5.3",
            f"{_RANGES}:Connection._require_range",
            "hub_xet:what_the_cdn_refuses_comes_over_xet",
        ),
        Behaviour(
            "gzip, by the Hub",
            "RFC 9110, 12.5.3",
            "hub.transport.limits:_limit",
            "hub_hostile:a_small_answer_that_unpacks_to_gigabytes_is_refused",
            ("gzip_anyway",),
        ),
    ),
    "13. Trusted Publishers": (
        Behaviour(
            "the job has no identity",
            _OIDC,
            "hub.transport.tokens:exchange_failure",
            "ci_tokens:a_job_without_an_identity_is_told_what_to_grant",
        ),
        Behaviour(
            "the resource does not trust the job",
            _OIDC,
            "hub.transport.tokens:exchange_failure",
            "ci_tokens:a_resource_that_does_not_trust_the_job_is_named",
        ),
        Behaviour(
            "the exchange fails",
            _OIDC,
            "hub.transport.tokens:exchange_failure",
            "ci_tokens:an_exchange_that_fails_is_a_documented_error",
        ),
        Behaviour(
            "a token for one thing",
            _OIDC,
            "hub.transport.tokens:one_scope",
            "ci_tokens:a_users_token_writes_nothing_and_the_message_says_why",
        ),
        Behaviour(
            "a token ends in the middle",
            _OIDC,
            f"{_ERRORS}:meaning",
            "ci_tokens:a_token_that_runs_out_during_the_push_is_exchanged_for_anew",
        ),
    ),
    "14. commits": (
        Behaviour(
            "429 that passes",
            _RATES,
            f"{_REMOTE}:Remote._require_another_attempt",
            "push_xet:a_limit_on_commits_that_passes_is_waited_for",
        ),
        Behaviour(
            "429 for an hour",
            _RATES,
            f"{_REMOTE}:_pause",
            "push_xet:a_limit_on_commits_that_lasts_is_told_and_what_was_sent_stays",
        ),
        Behaviour(
            "409 and 412: someone else has committed",
            _COMMIT,
            f"{_REMOTE}:Remote.commit",
            "push:another_commit_meanwhile_is_not_overwritten",
        ),
        Behaviour(
            "the answer is lost, the commit is not",
            _COMMIT,
            f"{_REMOTE}:Remote.commit",
            "push:a_commit_whose_answer_is_lost_was_made_once",
        ),
        Behaviour(
            "400: what was uploaded is gone",
            _COMMIT,
            f"{_REMOTE}:Remote.lost",
            "push_xet:what_was_swept_out_before_the_commit_is_sent_once_more",
        ),
        Behaviour(
            "a commit that lacks a file",
            _COMMIT,
            f"{_REMOTE}:Remote.require_complete",
            "push:a_commit_that_lacks_a_file_is_noticed",
        ),
    ),
}
