document.querySelectorAll('table.sortable').forEach(function(table){
  var body=table.tBodies[0],rows=Array.from(body.rows),filter=table.parentNode.querySelector('input'),
      only=table.parentNode.querySelector('select');
  Array.from(table.tHead.rows[0].cells).forEach(function(cell,k){
    cell.querySelector('button').addEventListener('click',function(){
      var up=cell.getAttribute('aria-sort')!=='ascending';
      Array.from(table.tHead.rows[0].cells).forEach(function(c){c.removeAttribute('aria-sort');});
      cell.setAttribute('aria-sort',up?'ascending':'descending');
      rows.sort(function(a,b){
        var x=a.cells[k].textContent,y=b.cells[k].textContent,n=parseFloat(x)-parseFloat(y);
        return (isNaN(n)?x.localeCompare(y):n)*(up?1:-1);});
      rows.forEach(function(r){body.appendChild(r);});});});
  function show(){rows.forEach(function(r){
    r.hidden=(filter.value&&r.textContent.toLowerCase().indexOf(filter.value.toLowerCase())<0)||
      (only.value==='wrong'&&!r.querySelector('.wrong'));});}
  filter.addEventListener('input',show);only.addEventListener('change',show);});
