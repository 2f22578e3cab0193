#!/bin/sh
# Make the virtual environment .venv with the pinned packages; where it is ready, do nothing. Every `make` begins here.
#
# .venv/.made-by-make is the first file in it: only a folder that has it, or .installed, is ever emptied.
# .venv/.installed is the last: it says where the folder is and what was installed. Without it an installation was
# interrupted, and as pip takes a half unpacked package for an installed one, everything is made anew. What was
# downloaded is in pip's cache.
set -eu
cd "$(dirname "$0")/.."
venv=.venv log=.venv/install.log started=$(date +%s)

say() { echo "granary: $*"; }
fail() { say "$*" >&2; exit 1; }
wanted() { pwd -P; cksum pyproject.toml infra/constraints.txt; }
installed() { cat $venv/.installed 2>/dev/null; }
ask() { "$1" -c "import sys; print($2)" 2>/dev/null; } # what the Python $1 says of itself
about() { ask "$1" '"%d.%d.%d, " % sys.version_info[:3] + sys.base_prefix'; }

lacks() { # Print what keeps the command $1 from being used, or nothing.
    command -v "$1" >/dev/null 2>&1 || { echo "is not installed"; return; }
    version=$(ask "$1" '"%d.%d" % sys.version_info[:2]') || { echo "does not run"; return; }
    case $version in 3.11 | 3.12 | 3.13) ;; *) echo "is Python $version"; return ;; esac
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        echo "has no venv with pip (Debian and Ubuntu: apt-get install python$version-venv)"
}

find_python() { # Set `python` to PYTHON, or to the first that will do. Fail in one sentence that says what each lacks.
    needs="Granary needs Python 3.11, 3.12 or 3.13 with venv" found=""
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3.11 python3.12 python3.13 python3; fi
    for name; do
        why=$(lacks "$name")
        [ -n "$why" ] || break
        found="$found${found:+, }$name $why"
    done
    [ -z "$why" ] || [ $# -gt 1 ] || fail "PYTHON=$found: $needs"
    [ -z "$why" ] || fail "$needs, and here $found: install one (Debian and Ubuntu: apt-get install" \
        "python3 python3-venv), or name one: make PYTHON=/path/to/python3.12"
    # In an activated environment this is the Python that made it: .venv may be activated, and about to be emptied.
    python=$(ask "$name" 'getattr(sys, "_base_executable", sys.executable)')
}

is_sound() { # Whether .venv runs, is where it was made, and has the Python that is asked for.
    [ -e $venv/.installed ] && here=$(about $venv/bin/python) || return 1
    [ -z "$(installed)" ] || [ "$(installed | head -n 1)" = "$(pwd -P)" ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(about "$PYTHON")" = "$here" ]
}

# One at a time, also beside a pip that outlives its killed `make`: it holds the lock too. (macOS has no flock.)
exec 9<infra/constraints.txt
if command -v flock >/dev/null && ! flock -n 9; then
    say "another make is installing: waiting for it"
    flock 9 || true
fi

[ -z "${PYTHON:-}" ] || find_python
if is_sound; then
    [ "$(installed)" != "$(wanted)" ] || exit 0
    say "the pinned packages have changed since $venv was made"
    : >$venv/.made-by-make # an older Makefile left none
else
    [ -e $venv/.made-by-make ] || [ -e $venv/.installed ] || [ -z "$(ls -A $venv 2>/dev/null)" ] ||
        fail "$venv was not made by make, and is left alone: install into it as README says, or move it away"
    find_python
    [ ! -e $venv/.made-by-make ] || say "$venv was interrupted or moved, or has another Python: making it anew"
    say "[1/3] making $venv with Python $(about "$python")"
    mkdir -p $venv && : >$venv/.made-by-make
    find $venv/ -mindepth 1 -maxdepth 1 ! -name .made-by-make -exec rm -rf {} +
    "$python" -m venv $venv >$log 2>&1 || { cat $log >&2; fail "$python cannot make a virtual environment"; }
fi

say "[2/3] fetching some 120 packages: 1 to 10 minutes, as your network is"
before=$(installed) || before=
rm -f $venv/.installed
{ $venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --constraint infra/constraints.txt \
    --editable '.[dev,readers,s3]' && wanted >$venv/.installed; } 2>&1 | tee $log | while IFS= read -r line; do
    case $line in
        *" Downloading "*"("[0-9][0-9]*" MB)") # 10 MB and more
            line=${line##* Downloading }
            echo "        ${line%%-[0-9]*} (${line##*"("}"
            ;;
        *"Installing collected packages"*) say "[3/3] unpacking them: 1 to 3 minutes" ;;
        *"Retrying ("*) echo "        $line" ;;
    esac
done
if [ ! -e $venv/.installed ]; then
    # An environment that was whole still is, if pip did not get so far as to change it.
    [ -z "$before" ] || grep -q "Installing collected packages" $log || echo "$before" >$venv/.installed
    tail -n 20 $log >&2
    if grep -qE "Failed (to build|building)|subprocess-exited-with-error" $log && ! command -v cc >/dev/null; then
        fail "a package has no wheel for this machine and there is no C compiler to build it:" \
            "install one (Debian and Ubuntu: apt-get install build-essential) and type make again"
    fi
    fail "pip could not install the packages: its last words are above, and the rest is in $log;" \
        "type make again once that is mended"
fi
say "ready after $(($(date +%s) - started)) s"
