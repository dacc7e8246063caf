//go:build linux

package reading

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-img/instar/sdk/formattest"
)

// commandLines are command lines that both programs take, or refuse, in the
// same way: exit code, standard output and what is said on standard error. One
// that begins with "code " has words of its own, and one with "old " is taken by
// 7.2 alone, "new " by 10.0 alone. They are quoted as for a shell.
const commandLines = `
info --bogus a.qcow2
info --bogus=1 a.qcow2
info -Z a.qcow2
info -f
info -U -f
info a.qcow2 --format
info --backing-chain=1 a.qcow2
info
map
check
compare
compare a.qcow2
map a.qcow2 a.qcow2
measure
measure --size 1M a.qcow2
measure -f qcow2 --size 1M
convert -Z
convert a.qcow2
create
create --bogus
create -f
dd
dd x
dd --bogus
bogus
''
-
--bogus
-Z
-T
--bogus info a.qcow2
-- info a.qcow2
-T nothing info a.qcow2
--tr nothing info a.qcow2
info -fqcow2 a.qcow2
info a.qcow2 -f qcow2
info -Uf qcow2 a.qcow2
code info -f=qcow2 a.qcow2
info --form qcow2 a.qcow2
info --form=raw a.qcow2
info --out=json a.qcow2
info --b a.qcow2
info --i a.qcow2
info --image-o driver=raw,file.filename=a.qcow2
code info --o=json a.qcow2
code compare --i=1 a.qcow2 a.qcow2
map --start 1M a.qcow2
map --max 1M --start=64k a.qcow2
old measure --s 1M
check --rep leaks a.qcow2
new compare --str a.qcow2 a.qcow2
new compare --a-format qcow2 --b-f qcow2 a.qcow2 a.qcow2
new check --cache none a.qcow2
new info -b a.qcow2
info -f '' a.qcow2
info --format= a.qcow2
check -f '' a.qcow2
map -f '' a.qcow2
compare -f '' a.qcow2 a.qcow2
compare -F '' a.qcow2 a.qcow2
measure -f '' a.qcow2
measure -O '' a.qcow2
measure -O '' --size 1M
create -f '' o 1M
convert -O '' a.qcow2 o
convert -f '' a.qcow2 o
dd -f '' if=a.qcow2 of=o
code dd -O '' if=a.qcow2 of=o
old check -r '' a.qcow2
old check -r foo a.qcow2
check -T foo a.qcow2
check -T '' a.qcow2
check -T none a.qcow2
compare -T foo a.qcow2 a.qcow2
info --object secret,id=a,data=x a.qcow2
map --object secret,id=a,data=x a.qcow2
check --object secret,id=a,data=x a.qcow2
code info --object secret a.qcow2
info --image-opts -f qcow2 driver=qcow2,file.filename=a.qcow2
compare --image-opts -F qcow2 driver=qcow2,file.filename=a.qcow2 driver=qcow2,file.filename=a.qcow2
dd --image-opts -f qcow2 if=a of=b
info ''
check ''
map ''
measure ''
compare '' ''
check -r all -U a.qcow2
check -r leaks --image-opts driver=qcow2,file.filename=a.qcow2,force-share=on
check -r all --image-opts driver=qcow2,file.filename=a.qcow2,read-only=on
check -r all --image-opts driver=qcow2,file.filename=a.qcow2,file.read-only=on
check -r all --image-opts driver=qcow2,file.filename=a.qcow2,file.auto-read-only=on
check -U --image-opts driver=qcow2,file.filename=a.qcow2,read-only=off
map --image-opts driver=qcow2,file.filename=top.qcow2,backing.backing.driver=raw,backing.backing.file.filename=r10
map --image-opts driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2
map --output=json --image-opts driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.driver=file,backing.file.filename=r10
map --image-opts driver=qcow2,file.driver=raw,file.file.filename=a.qcow2
code info --image-opts driver=qcow2,file.driver=qcow2,file.file.filename=a.qcow2
code info --image-opts driver=qcow2,file.filename=a.qcow2,file.locking=foo
code info --image-opts driver=qcow2,file.filename=a.qcow2,file.aio=foo
info --image-opts driver=qcow2,file.filename=a.qcow2,discard=foo
code info --image-opts driver=qcow2,file.filename=a.qcow2,detect-zeroes=foo
code info --image-opts driver=qcow2,file.filename=a.qcow2,cache=foo
info --image-opts driver=qcow2,file.filename=a.qcow2,cache.direct=foo
info --image-opts driver=qcow2,file.filename=a.qcow2,cache.no-flush=on,node-name=foo,discard=unmap,detect-zeroes=on,file.aio=threads
code info --image-opts driver=qcow2,file.filename=a.qcow2,bogus=1M
code info --image-opts driver=qcow2,file.filename=a.qcow2,file.bogus=1M
info --image-opts driver=qcow2,file.filename=a.qcow2,force-share=foo
info --image-opts driver=qcow2,file.filename=a.qcow2,driver=raw
info --image-opts driver=,file.filename=a.qcow2
info --image-opts file.filename=
info --image-opts filename=a.qcow2
info --image-opts driver=raw,filename=a.qcow2
info --output=json --image-opts driver=file,filename=a.qcow2
info --image-opts driver=file,filename=a.qcow2
map --image-opts driver=file,filename=a.qcow2
check --image-opts driver=file,filename=a.qcow2
measure --image-opts driver=file,filename=a.qcow2
info --image-opts a.qcow2
info --image-opts ''
info "json:{'driver':'qcow2','file':{'driver':'file','filename':'a.qcow2'}}"
info 'json:{"driver":"qcow2","file.filename":"a.qcow2"}}'
info 'json:{"driver":"qcow2","file.filename":"a.qcow2"}x'
info 'json: {"driver":"qcow2","file.filename":"a.qcow2"} '
info 'json:{"driver":"qcow2","driver":"raw","file.filename":"a.qcow2"}'
code info 'json:{"driver":"qcow2","file.filename":"a.qcow2","file":{"filename":"b"}}'
info 'json:{"driver":"qcow2","filename":"a.qcow2"}'
info 'json:{"filename":"a.qcow2"}'
code info 'json:{"driver":"qcow2","file.filename":1}'
info 'json:{"driver":"qcow2","read-only":true,"force-share":true,"file":{"filename":"a.qcow2"}}'
info 'json:{"driver":"qcow2","read-only":1,"file":{"filename":"a.qcow2"}}'
info 'json:null'
info 'json:[]'
info 'json:"x"'
info 'json:'
code info 'json:{bad'
code info 'json:{"a":1,}'
info 'json:{"driver":"qcow2"}'
code info 'json:{"driver":"qcow2","file":"node"}'
info 'json:{"driver":"qcow2","file":{}}'
info 'json:{"driver":"qcow2","file":null}'
map 'json:{"driver":"qcow2","file":{"filename":"top.qcow2"},"backing":null}'
`

// TestCommandLines runs the command lines with both programs, as 7.2 and as
// 10.0. Usage errors have the words of 7.2; with 10.0 only what is printed and the
// exit code are compared.
func TestCommandLines(t *testing.T) {
	instar := program(t)
	dir := t.TempDir()
	formattest.Script(t, dir, `
qemu-img create -q -f raw r10 10M
qemu-img create -q -f qcow2 a.qcow2 8M
qemu-io -c 'write 1M 1M' a.qcow2
qemu-img create -q -f qcow2 -b r10 -F raw mid.qcow2
qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2
qemu-io -c 'write 3M 64k' mid.qcow2
`)
	for _, version := range []string{"7.2", "10.0"} {
		t.Run(version, func(t *testing.T) {
			var qemu []string
			if version == "10.0" {
				qemu = qemuImg10(t)
			} else {
				qemu = qemuImg72(t)
			}
			compareLines(t, dir, version, instar, qemu, commandLines)
		})
	}
}

// compareLines runs command lines, one a line, with both programs.
func compareLines(t *testing.T, dir, version, instar string, qemu []string, list string) {
	t.Helper()
	for line := range strings.Lines(strings.TrimPrefix(list, "\n")) {
		line = strings.TrimSuffix(line, "\n")
		line, words := strings.CutPrefix(line, "code ")
		line, old := strings.CutPrefix(line, "old ")
		line, recent := strings.CutPrefix(line, "new ")
		if old && version != "7.2" || recent && version == "7.2" {
			continue
		}
		sh := []string{"sh", "-c", `exec "$@" ` + line, "sh"}
		want := runAs(t, dir, version, slices.Concat(sh, qemu)...)
		got := runAs(t, dir, version, append(sh, instar)...)
		if words || version != "7.2" {
			if got.Code != 0 && got.Stderr == "" {
				t.Errorf("%s: no message", line)
			}
			want.Stderr, got.Stderr = "", ""
		}
		want.Stderr = likeInstar(want.Stderr)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-qemu-img +instar):\n%s", line, diff)
		}
	}
}

// qemuImg72 skips a test where the installed qemu-img is not 7.2.
func qemuImg72(t *testing.T) []string {
	t.Helper()
	if out, err := exec.Command("qemu-img", "--version").Output(); err != nil || !strings.Contains(string(out), " version 7.2") {
		t.Skipf("NOT COMPARED with qemu-img 7.2: the installed one is another: %v", err)
	}
	return []string{"qemu-img"}
}

// likeInstar replaces the program's name and drops the warning about trace
// events that do not exist.
func likeInstar(stderr string) string {
	var b strings.Builder
	for line := range strings.Lines(stderr) {
		if strings.Contains(line, "warning: trace event") {
			continue
		}
		line = strings.Replace(line, "qemu-img: ", "instar: ", 1)
		b.WriteString(strings.Replace(line, "Try 'qemu-img ", "Try 'instar ", 1))
	}
	return b.String()
}
