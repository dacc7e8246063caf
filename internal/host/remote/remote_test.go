package remote

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func content(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < n/3; i++ {
		b[i] = byte(r.Uint32())
	}
	return b
}

func fetched(t *testing.T, f *os.File) []byte {
	t.Helper()
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<40))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestFetch(t *testing.T) {
	for _, n := range []int{0, 1, chunk, chunk + 1, 5*chunk + 77} {
		want := content(n)
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.ServeContent(w, r, "x", time.Unix(1, 0), bytes.NewReader(want))
		}))
		f, err := Fetch(context.Background(), srv.URL, nil)
		if err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if !bytes.Equal(fetched(t, f), want) {
			t.Errorf("%d bytes: content differs", n)
		}
		srv.Close()
	}
}

func TestFetchGoesOnAfterBrokenConnections(t *testing.T) {
	want := content(3 * chunk)
	var requests atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if requests.Add(1)%3 == 2 {
			panic(http.ErrAbortHandler)
		}
		http.ServeContent(w, r, "x", time.Unix(1, 0), bytes.NewReader(want))
	}))
	defer srv.Close()
	f, err := Fetch(context.Background(), srv.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(fetched(t, f), want) {
		t.Error("content differs")
	}
}

func TestFetchRefusals(t *testing.T) {
	for name, tt := range map[string]struct {
		handler http.HandlerFunc
		want    string
	}{
		"no ranges":      {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "all of it") }, "does not serve ranges"},
		"not found":      {http.NotFound, "404"},
		"no total":       {partial("bytes 0-0/*"), "does not tell the length"},
		"negative total": {partial("bytes 0-0/-5"), "does not tell the length"},
		"another range":  {partial("bytes 0-0/9"), "was asked for"},
	} {
		srv := httptest.NewServer(tt.handler)
		_, err := Fetch(context.Background(), srv.URL, nil)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
		srv.Close()
	}
}

func partial(contentRange string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Range", contentRange)
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write([]byte{1})
	}
}

func TestFetchRefusesAChangedFile(t *testing.T) {
	var requests atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", map[bool]string{true: `"a"`, false: `"b"`}[requests.Add(1) == 1])
		http.ServeContent(w, r, "x", time.Unix(1, 0), bytes.NewReader(content(chunk)))
	}))
	defer srv.Close()
	if _, err := Fetch(context.Background(), srv.URL, nil); err == nil || !strings.Contains(err.Error(), "changed while it was read") {
		t.Error(err)
	}
}

func TestSpool(t *testing.T) {
	want := content(3<<20 + 5)
	f, err := Spool(context.Background(), bytes.NewReader(want), "-", int64(len(want)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(fetched(t, f), want) {
		t.Error("content differs")
	}
	// Nothing comes, and somebody loses patience.
	r, w := io.Pipe()
	defer w.Close()
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := Spool(ctx, r, "-", 1<<30, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("the end of the context: %v", err)
	}
	if _, err := Spool(context.Background(), bytes.NewReader(want), "-", int64(len(want))+1, nil); err == nil || !strings.Contains(err.Error(), "ends after") {
		t.Error(err)
	}
	if _, err := Spool(context.Background(), bytes.NewReader(want), "-", int64(len(want))-1, nil); err == nil || !strings.Contains(err.Error(), "goes on after") {
		t.Error(err)
	}
}
