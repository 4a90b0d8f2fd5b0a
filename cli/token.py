"""`quire token new`: makes a token, and the line by which the server's token file knows it."""

import argparse
import sys

from quire.cluster.gateway.tenants import Caller, Limits, Role
from quire.cluster.gateway.tokens import new_token, parse_caller, token_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a token. Standard output gets the token alone, to be kept as QUIRE_API_KEY or in a file; standard error the line for the "
        "server's token file (quire serve --token-file), which cannot be turned back into the token."
    )
    parser.add_argument("what", choices=("new",), metavar="new")
    parser.add_argument("--tenant", required=True, help="whose token it is: a-z, 0-9 and . _ -")
    parser.add_argument("--role", default="user", choices=[role.value for role in Role], help="admin sees and steers the whole cluster")
    parser.add_argument("--max-requests", metavar="N", type=int, help="requests that the tenant may have in flight")
    parser.add_argument("--tokens-per-minute", metavar="N", type=int, help="of prompts and completions of the tenant")


def run(args: argparse.Namespace) -> int:
    asked = Caller(args.tenant, Role(args.role), Limits(args.max_requests, args.tokens_per_minute))
    token = new_token()
    line = token_line(token, asked)
    parse_caller(line.split(" ")[1:])  # what the server would refuse is refused here
    print(line, file=sys.stderr)
    print(token)
    return 0
