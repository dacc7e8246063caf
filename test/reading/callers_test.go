//go:build linux

package reading

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-img/instar/sdk/formattest"
)

// callerLines are what programs that call qemu-img run, as docs/callers.md lists
// them. What a line makes is called o. $PWD is the directory of the images.
const callerLines = `
# OpenStack: nova, cinder, glance
env LC_ALL=C LANG=C qemu-img info a.qcow2
env LC_ALL=C LANG=C qemu-img info --output=json top.qcow2 --force-share
prlimit --as=1073741824 --cpu=30 env LC_ALL=C LANG=C qemu-img info --output=json s.vmdk --force-share -f vmdk
qemu-img info -f qcow2 --output=json r.raw
qemu-img info -f vmdk --output=json r.raw
qemu-img info -f vpc --output=json r.raw
qemu-img info --output=json nothing
qemu-img convert -t none -O raw -f qcow2 a.qcow2 o
qemu-img convert -t writeback -O qcow2 -f qcow2 -c top.qcow2 o
qemu-img convert -f raw -O qcow2 odd.raw o
qemu-img convert -O vpc -t none -o subformat=dynamic -f raw r.raw o
qemu-img convert -O qcow2 -t none -W -f raw r.raw o
qemu-img create -f qcow2 -o backing_file=a.qcow2,backing_fmt=qcow2,size=8388608 o
qemu-img create -f qcow2 -o cluster_size=64k,preallocation=falloc o 4M
qemu-img create -f qcow2 o 10G -o compat=1.1
# Proxmox VE
qemu-img create -o preallocation=metadata -f qcow2 o 8192K
qemu-img create -b a.qcow2 -F qcow2 -f qcow2 $PWD/o
qemu-img info --output=json a.qcow2 -f qcow2
qemu-img convert -p -n -f qcow2 -O raw a.qcow2 o.raw && mv o.raw o
qemu-img convert -p -n -l snapshot.name=s1 -t none -T none -r 102400K -f qcow2 -O raw a.qcow2 o.raw && mv o.raw o
qemu-img create -q -f qcow2 o 2M; qemu-img convert -p -n -f raw --target-image-opts r.raw driver=qcow2,file.driver=file,file.filename=$PWD/o
qemu-img measure --output=json -O qcow2 a.qcow2
qemu-img measure --size 10G -O qcow2 --output json
qemu-img info --output=json -f qcow2 --backing-chain -- top.qcow2
qemu-img create -F qcow2 -b a.qcow2 -f qcow2 -o extended_l2=on,cluster_size=128k,preallocation=metadata -- o
qemu-img measure --output=json --size 8192K -O qcow2 -o extended_l2=on,cluster_size=128k
# KubeVirt CDI
prlimit --as=1073741824 --cpu=30 qemu-img info --output=json a.qcow2
qemu-img info --output=json 'json: {"file.driver": "file", "file.filename": "a.qcow2"}'
qemu-img convert -t writeback -p -O raw a.qcow2 o
qemu-img convert -t none -p -O raw a.qcow2 o -o preallocation=falloc -S 0
qemu-img convert -t none -p -O raw -W -n -S 0 a.qcow2 o.raw && mv o.raw o
qemu-img create -f raw o 4194304 -o preallocation=falloc
# Lima
qemu-img convert -O raw a.qcow2 o
qemu-img info --output=json --force-share a.vmdk
qemu-img create -f qcow2 -F qcow2 -b a.qcow2 o 107374182400
# libvirt
qemu-img create -f qcow2 -o preallocation=metadata,nocow=on,compat=1.1,lazy_refcounts=on,cluster_size=65536,extended_l2=off o 4096K
qemu-img create -f qcow2 -b $PWD/a.qcow2 -o backing_fmt=qcow2,compat=0.10 o 1048576K
qemu-img create -f qcow2 -o backing_fmt=raw,compat=1.1,lazy_refcounts -b r.raw o
qemu-img convert -f raw -O raw r.raw o
# libguestfs and virt-v2v
(ulimit -v 1048576 -t 10; qemu-img info -U --output json ./top.qcow2)
exec 7<a.qcow2; qemu-img info --output json /dev/fd/7
qemu-img create -f qcow2 -o preallocation=falloc,compat=0.10,cluster_size=4096 ./o 1048576
qemu-img convert -f qcow2 -O qcow2 -o compat=1.1 -c json:'{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"}}' o
# oVirt: vdsm and imageio
qemu-img info --output json -f qcow2 --backing-chain -U top.qcow2
qemu-img measure --output json -O qcow2 'json:{"file": {"driver": "file", "filename": "top.qcow2"}, "driver": "qcow2", "backing": null}'
qemu-img measure --output json -O raw 'json:{"file": {"driver": "file", "filename": "top.qcow2"}, "driver": "qcow2"}'
qemu-img create -f qcow2 -o compat=1.1 -b nothing -F qcow2 -u o 1073741824
qemu-img create -f qcow2 -o compat=1.1 -b a.qcow2 -F qcow2 -o preallocation=metadata o
qemu-img check --output json -f qcow2 a.qcow2
qemu-img check --output json -f qcow2 r.raw
qemu-img convert -p -t none -T none -f qcow2 -O qcow2 -o compat=1.1,backing_file=a.qcow2,backing_fmt=qcow2 top.qcow2 o
qemu-img convert -p -t none -T none -f qcow2 -O qcow2 -o compat=1.1 --bitmaps a.qcow2 o
qemu-img convert -p -t none -T none -f qcow2 -O raw -n -W a.qcow2 o.raw && mv o.raw o
qemu-img map --output json top.qcow2
qemu-img compare -p -f qcow2 -F qcow2 a.qcow2 a.qcow2
qemu-img compare -U a.qcow2 a.vmdk
qemu-img compare -f qcow2 -F qcow2 r.raw a.qcow2
# CloudStack
qemu-img create -o preallocation=off,cluster_size=65536 -f qcow2 o 10737418240
qemu-img convert -n --target-is-zero -W -S 1M -O raw -t none -U --image-opts driver=qcow2,file.filename=a.qcow2 o.raw && mv o.raw o
qemu-img convert -O qcow2 -l snapshot.name=s1 -U --image-opts driver=qcow2,file.filename=a.qcow2 o
qemu-img info -U top.qcow2
# Packer, Vagrant, image builders
qemu-img create -f qcow2 -b a.qcow2 -F qcow2 o 40G
qemu-img convert -c -O qcow2 a.qcow2 o
qemu-img convert a.vmdk -O raw o
qemu-img convert -p -S 512 -O qcow2 r.raw o
qemu-img convert -f raw -O qcow2 -c -m 4 -o cluster_size=2M r.raw o
qemu-img dd if=a.qcow2 of=o bs=64k count=20 -O raw
umask 077; qemu-img create -f qcow2 o 1M
touch x; ln -s x o; qemu-img convert -O qcow2 r.raw o
# names of outputs
qemu-img convert -O raw file:a.qcow2 file:o
qemu-img create -f qcow2 file:o 1M
qemu-img dd -O raw if=a.qcow2 of=file:o
qemu-img convert -n -O qcow2 r.raw 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}' && mv a.qcow2 o
qemu-img convert -n -O raw a.qcow2 file:o.raw && mv o.raw o
qemu-img create -f qcow2 foo:o 1M
qemu-img create -f qcow2 ./foo:o 1M && mv foo:o o
qemu-img convert -O qcow2 r.raw foo:o
qemu-img dd -O raw if=a.qcow2 of=foo:o
`

var progress = regexp.MustCompile(`    \(0\.00/100%\)\r(    \(\d+\.\d\d/100%\)\r)*    \(100\.00/100%\)\r`)

// TestCallers runs what callers run with both programs under the name of qemu-img,
// each among images of its own, and compares what is printed and made.
func TestCallers(t *testing.T) {
	qemu := qemuImg72(t)
	names := t.TempDir()
	if err := os.Symlink(program(t), filepath.Join(names, "qemu-img")); err != nil {
		t.Fatal(err)
	}
	fixture := t.TempDir()
	formattest.Script(t, fixture, `
qemu-img create -q -f raw r.raw 2M
qemu-io -f raw -c 'write -P 1 512k 256k' r.raw
qemu-img create -q -f raw o.raw 2M
qemu-img create -q -f qcow2 a.qcow2 2M
qemu-io -c 'write -P 2 512k 64k' -c 'write -P 3 1M 64k' a.qcow2
qemu-img snapshot -c s1 a.qcow2
qemu-io -c 'write -P 4 1M 64k' a.qcow2
qemu-img bitmap --add --enable a.qcow2 b0
qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 top.qcow2
qemu-io -c 'write -P 5 1536k 64k' top.qcow2
qemu-img convert -O vmdk a.qcow2 a.vmdk
qemu-img convert -O vmdk -o subformat=streamOptimized a.qcow2 s.vmdk
sh -c 'printf hello > odd.raw'
`)
	for line := range strings.Lines(strings.TrimPrefix(callerLines, "\n")) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#") {
			continue
		}
		theirs, want := call(t, fixture, os.Getenv("PATH"), line)
		ours, got := call(t, fixture, names+":"+os.Getenv("PATH"), line)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-qemu-img +instar):\n%s", line, diff)
		}
		if diff := cmp.Diff(list(t, theirs), list(t, ours)); diff != "" {
			t.Errorf("%s: files (-qemu-img +instar):\n%s", line, diff)
			continue
		}
		if _, err := os.Stat(filepath.Join(ours, "o")); err != nil {
			continue
		}
		if diff := cmp.Diff(made(t, qemu[0], theirs), made(t, qemu[0], ours)); diff != "" {
			t.Errorf("%s: what was made (-qemu-img +instar):\n%s", line, diff)
		}
	}
}

// TestInUse compares what can be done with images that another process writes
// into: raw ones hold no structures that could be read half written, and of a
// backing file create needs the size alone.
func TestInUse(t *testing.T) {
	qemu, instar := qemuImg72(t), program(t)
	dir := t.TempDir()
	formattest.Script(t, dir, `
qemu-img create -q -f raw r.raw 2M
qemu-io -f raw -c 'write 512k 256k' r.raw
qemu-img create -q -f raw other.raw 2M
qemu-img create -q -f qcow2 q.qcow2 2M
qemu-img create -q -f qcow2 -b r.raw -F raw over.qcow2
qemu-img create -q -f qcow2 -b q.qcow2 -F qcow2 top.qcow2
`)
	for _, file := range []string{"r.raw", "q.qcow2"} {
		hold := exec.Command("qemu-io", "-f", strings.TrimPrefix(filepath.Ext(file), "."), filepath.Join(dir, file))
		in, err := hold.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := hold.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := hold.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			in.Close()
			_ = hold.Wait()
		})
		if _, err := in.Write([]byte("length\n")); err != nil {
			t.Fatal(err)
		}
		if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Fatal(err) // it has the image open when it answers
		}
	}
	compareLines(t, dir, "7.2", instar, qemu, `
info r.raw
info -f raw r.raw
info -f raw q.qcow2
info -f qcow2 r.raw
info q.qcow2
info -U q.qcow2
info --backing-chain over.qcow2
info --backing-chain top.qcow2
map r.raw
map over.qcow2
map top.qcow2
map -U top.qcow2
measure -O qcow2 r.raw
measure -O qcow2 q.qcow2
compare r.raw other.raw
compare over.qcow2 r.raw
compare q.qcow2 other.raw
check r.raw
check q.qcow2
dd if=r.raw of=o
dd if=q.qcow2 of=o
convert -O raw r.raw o
code convert -O raw over.qcow2 o
convert -O raw q.qcow2 o
convert -U -O raw q.qcow2 o
convert -n -O qcow2 other.raw q.qcow2
create -f qcow2 -b r.raw -F raw o
create -f qcow2 -b q.qcow2 -F qcow2 o
create -f qcow2 -b top.qcow2 -F qcow2 o
code create -f qcow2 -b q.qcow2 o
create -f qcow2 q.qcow2 1M
`)
	// A verdict must be of what the image stays.
	if got := runAs(t, dir, "7.2", instar, "inspect", "r.raw"); !strings.Contains(got.Stdout+got.Stderr, `Failed to get shared "write" lock`) {
		t.Errorf("inspect: %+v", got)
	}
}

// call runs a line among copies of the images.
func call(t *testing.T, fixture, path, line string) (dir string, got outcome) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "images") // backing files are resolved in it
	if err := os.CopyFS(dir, os.DirFS(fixture)); err != nil {
		t.Fatal(err)
	}
	got = runAs(t, dir, "7.2", "env", "PATH="+path, "bash", "-c", "umask 022; "+line)
	for _, text := range []*string{&got.Stdout, &got.Stderr} {
		*text = strings.ReplaceAll(progress.ReplaceAllString(*text, "PROGRESS"), dir, "DIR")
	}
	got.Stdout = regexp.MustCompile(`(disk size: |"actual-size": )[^\n]*`).ReplaceAllString(got.Stdout, "${1}SOME")
	return dir, got
}

// list returns the names in a directory with their modes.
func list(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, info.Mode().String()+" "+e.Name())
	}
	return names
}

// made is what qemu-img says of the image o in a directory, and its content. A
// backing file that is missing is missing for both.
func made(t *testing.T, qemu, dir string) []outcome {
	t.Helper()
	info := run(t, dir, qemu, "info", "--output=json", "o")
	var fields map[string]any
	if err := json.Unmarshal([]byte(info.Stdout), &fields); err != nil {
		t.Fatalf("%v: %s%s", err, info.Stdout, info.Stderr)
	}
	delete(fields, "actual-size")
	text, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	info.Stdout = strings.ReplaceAll(string(text), dir, "DIR")
	check := run(t, dir, qemu, "check", "-q", "o")
	check.Stderr = strings.ReplaceAll(check.Stderr, dir, "DIR")
	out := []outcome{info, check}
	if check.Code != 0 && check.Code != 63 {
		return out
	}
	content := filepath.Join(t.TempDir(), "content")
	if raw, err := exec.Command(qemu, "dd", "-O", "raw", "bs=1M", "count=2", "if="+filepath.Join(dir, "o"), "of="+content).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, raw)
	}
	b, err := os.ReadFile(content)
	if err != nil {
		t.Fatal(err)
	}
	return append(out, outcome{Stdout: string(slices.Clip(b))})
}
