"""Why a place cannot be read where waiting does not help: one sentence from any library's errors, with what to do.

aiohttp says of a server that redirects in a circle "0, message=''", and fsspec of every answer that there is no file.
"""

import ssl
from collections.abc import Sequence
from http import HTTPStatus

WORDS = {
    400: "the server does not understand this URL; mend it",
    401: "the server wants to know who asks; give credentials in the environment (HF_TOKEN, AWS_ACCESS_KEY_ID, ...), "
    "here and on the workers, or download the files",
    402: "the server wants to be paid; download the files from another place",
    403: "who asks may not read it, or a signed URL has run out; ask for access, or give a URL that is still good",
    404: "there is nothing of this name; mend it",
    407: "the proxy wants to know who asks; mend HTTPS_PROXY",
    410: "it was there and has been removed; give another place",
    416: "the server does not send the part that was asked for; download the files",
    451: "the server may not give it for legal reasons; give another place",
}
"""HTTP status -> what it means, and what to do."""
REDIRECTS = {"TooManyRedirects", "TooManyRedirectsError"}
LASTING_TLS = (
    *("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE", "UNKNOWN_PROTOCOL"),
    *("CERTIFICATE_VERIFY_FAILED", "TLSV1_ALERT_PROTOCOL_VERSION", "TLSV1_UNRECOGNIZED_NAME", "NO_SHARED_CIPHER"),
    *("SSLV3_ALERT_HANDSHAKE_FAILURE", "DH_KEY_TOO_SMALL", "TLSV13_ALERT_CERTIFICATE_REQUIRED"),
)
"""Reasons of TLS that the next try would have, too; others are of connections that broke off."""


def lasting_tls(chain: Sequence[BaseException]) -> ssl.SSLError | None:
    """The error of TLS in a chain of errors that trying again does not mend."""
    found = (each for each in chain if isinstance(each, ssl.SSLError) and getattr(each, "reason", None) in LASTING_TLS)
    return next(found, None)


def redirects_without_end(chain: Sequence[BaseException]) -> bool:
    return any({kind.__name__ for kind in type(each).__mro__} & REDIRECTS for each in chain)


def refusal_of(chain: Sequence[BaseException], status: int | None) -> str | None:
    """What a chain of errors says, with advice; None where its own words have to do. `status`: of the answer."""
    if redirects_without_end(chain):
        return "the server redirects without an end; open the URL in a browser, and give where it leads"
    if (tls := lasting_tls(chain)) is not None:
        if isinstance(tls, ssl.SSLCertVerificationError) or tls.reason == "CERTIFICATE_VERIFY_FAILED":
            why = getattr(tls, "verify_message", "") or "it cannot be verified"
            return (
                f"the server's certificate is not trusted ({why}); mend the host's name, or name the authority that "
                "signed it (SSL_CERT_FILE)"
            )
        spoken = "the server does not speak TLS there; write http:// if that is meant, or mend the port"
        is_plain = tls.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")
        return spoken if is_plain else f"there is no secure connection with the server ({tls.reason}); ask its owner"
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    if "OfflineModeIsEnabled" in names or any("OfflineModeIsEnabled" in str(each) for each in chain):
        return (
            "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set, so that nothing is asked of the hub; unset it, or give "
            "corpus.path the files"
        )
    if "GatedRepoError" in names:
        return "the hub gives it to those only who asked for access; ask there, and set HF_TOKEN to a token of yours"
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return "the hub has none of this name, or one that is not for you; mend the name, or set HF_TOKEN"
    if status is None:
        return None
    try:
        phrase = f" ({HTTPStatus(status).phrase})"
    except ValueError:
        phrase = ""
    return f"HTTP {status}{phrase}: {WORDS.get(status, 'the server refuses; open the URL in a browser to see why')}"
