#!/bin/sh
# Takes out of a dealer's environment what no dealer loads: symbols and headers that only a linker reads, what torch asks for to compile
# models, packages' own tests and type stubs, bytecode, pip.
#   python3 -m venv VENV
#   VENV/bin/pip install --no-compile -r deploy/dealer.txt && VENV/bin/pip install --no-compile --no-deps .
#   deploy/slim.sh VENV
# What is left deals, and nothing more is installed into it: to upgrade, make it anew. At the end it is tried, and it fails if that does.
set -eu

fail() { echo "slim.sh: $1" >&2; exit 2; }

[ $# -eq 1 ] || fail "give one environment: deploy/slim.sh VENV"
venv=$1
python=$venv/bin/python
[ -f "$venv/pyvenv.cfg" ] && [ -x "$python" ] || fail "$venv is no virtual environment"
site=$("$python" -I -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
[ -f "$site/privinf/dealer/dealer.py" ] || fail "privinf is not installed in $venv (an editable installation is not looked into)"
[ ! -e "$site/crypten" ] || fail "$venv has CrypTen: it is of a server or a client, which load more than a dealer does"

megabytes() { echo $(($(du -sk "$venv" | cut -f1) * 1024 / 1000000)); }
before=$(megabytes)

# the compiler and the exporter of torch, what only these import, what installs, and the model that is shipped
for name in sympy mpmath networkx pip setuptools; do
    rm -rf "${site:?}/$name" "$site/$name"-*.dist-info
done
rm -rf "$site/torch/_inductor" "$site/torch/_dynamo" "$site/torch/onnx" "$site/torchgen/packaged"
rm -rf "$site/privinf/pylib" "$site/isympy.py" "$site/pkg_resources" "$site/_distutils_hack" "$site/distutils-precedence.pth"
rm -f "$venv"/bin/pip* "$venv"/bin/isympy "$venv"/share/man/man1/isympy.1
# for who builds against them
rm -rf "$site/torch/include" "$site/torch/share/cmake" "$site"/torch/bin/protoc* "$site/numpy/_core/include" "$site/numpy/f2py" "$site/numpy/distutils"
find "$site" -type d -name tests -prune -exec rm -rf {} +
find "$site" -type f \( -name '*.pyi' -o -name '*.a' -o -name '*.pyc' \) -exec rm -f {} +

# symbols; not in NAME.libs, whose files were patched after they were linked, in a way that not every strip understands
if command -v strip >/dev/null; then
    find "$site" -type f -name '*.so*' ! -path '*.libs/*' -size +64k | while IFS= read -r library; do
        if strip --strip-unneeded -o "$library.stripped" "$library" 2>/dev/null; then
            chmod 755 "$library.stripped"
            mv "$library.stripped" "$library" # another file: one that is linked elsewhere stays whole there
        else
            rm -f "$library.stripped" # no library of this machine's kind
        fi
    done
else
    echo "slim.sh: there is no strip (package binutils): symbols stay, some 120 MB" >&2
fi

"$python" -I -B - <<'TRY' || fail "what is left of $venv does not work: make it anew, and do without this script"
import numba, torch
import privinf.cli.dealer, privinf.dealer.dealer, privinf.session.metrics
assert numba.njit(lambda x: x + 1)(1) == 2
assert int((torch.ones(2, 2, dtype=torch.int64) @ torch.ones(2, 1, dtype=torch.int64)).sum()) == 4
TRY
echo "$venv: $before MB, now $(megabytes) MB"
